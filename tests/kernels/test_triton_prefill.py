from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.test_triton_decode_step import QWEN1, QWEN3, network
from tests.kernels.test_triton_int_matvec import quantized
from tests.kernels.triton_cases import DEVICE, error

pytest.importorskip("triton")
from qwenfit.config import ModelConfig
from qwenfit.engine import mixed_graphs
from qwenfit.engine.brought import Brought
from qwenfit.engine.mixed_graphs import MixedStep
from qwenfit.engine.prompt_graphs import PromptStep
from qwenfit.kernels.triton.int_matvec import pack_blocked
from qwenfit.model import prefill as prefill_module
from qwenfit.model.batch import Chunk, make_batch
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.prefill import prefill


@pytest.mark.parametrize(
    ("config", "kv"), [(QWEN1, "fp32"), (QWEN3, "fp32"), (QWEN1, "int8"), (QWEN3, "int8")], ids=str
)
def test_a_step_with_prompts_on_the_gpu_is_a_step_of_the_network(config: ModelConfig, kv: str) -> None:
    """A prompt and the first part of another; then a decoded token, the rest, and a third prompt."""
    theirs, ours = network(config), network(config).to(DEVICE)
    caches = KVCache(config, 12, 4, kv), KVCache(config, 12, 4, kv, DEVICE)
    long, alpha = list(range(3, 20)), config.ntk_alpha(17)
    steps = [
        [Chunk(list(range(5)), 0, [3, 1]), Chunk(long[:9], 0, [0, 5, 9, 2, 7], alpha, "none")],
        [
            Chunk([11], 5, [3, 1]),
            Chunk(long[9:], 9, [0, 5, 9, 2, 7], alpha),
            Chunk([9, 8, 7], 0, [4], logits="none"),
        ],
    ]
    for chunks in steps:
        batch, there = make_batch(chunks, 4), make_batch(chunks, 4, DEVICE)
        hidden = theirs(batch, caches[0])
        bound = 3e-3 if kv == "int8" else 1e-4
        if chunks is steps[0]:
            assert error(prefill(ours, there, caches[1]).cpu(), hidden) < bound
        else:
            rows = prefill(ours, there, caches[1], there.logits_indices)
            assert rows.shape == (2, config.hidden_size)
            assert error(rows.cpu(), hidden[batch.logits_indices]) < bound
            assert error(ours.logits(rows).cpu(), theirs.logits(hidden[batch.logits_indices])) < bound


# Rows of padding hold anything.
@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("config", [QWEN1, QWEN3], ids=["Qwen-1", "Qwen3"])
@pytest.mark.parametrize("kv", ["fp32", "int8"])
def test_a_step_on_buffers_that_stay_in_place_serves_one_batch_after_the_other(
    config: ModelConfig, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More and fewer sequences, prompts and parts of some, tokens that the host knows or does not; nothing remains."""
    monkeypatch.setattr(mixed_graphs, "PROMPTS", 4)
    monkeypatch.setattr(mixed_graphs, "BEFORE", 16)
    monkeypatch.setattr(mixed_graphs, "WIDE_CONFIG", {"m": 16, "n": 16, "warps": 1, "stages": 1})
    theirs, ours = network(config), network(config).to(DEVICE)
    caches = KVCache(config, 16, 4, kv), KVCache(config, 16, 4, kv, DEVICE)
    last = torch.tensor([7, 11, 5, 13], device=DEVICE)
    logits = torch.full((4, config.vocab_size), torch.nan, device=DEVICE)
    step = MixedStep(ours, caches[1], 24, 5, last, logits)
    long = [i % 60 for i in range(3, 16)]  # no longer than what NTK leaves alone
    tables = [3, 1, 8], [0, 5, 9, 2, 7], [4, 6], [10, 11, 12]
    batches = [
        [Chunk(list(range(5)), 0, tables[0]), Chunk(long[:9], 0, tables[1], logits="none")],
        [Chunk([11], 5, tables[0]), Chunk(long[9:], 9, tables[1]), Chunk([9, 8, 7], 0, tables[2])],
        [Chunk([5], 3, tables[2]), Chunk([6], 6, tables[0]), Chunk([2] * 10, 0, tables[3]), Chunk([1], 13, tables[1])],
        [Chunk([13], 10, tables[3])],
        [Chunk(long, 0, tables[1])],
    ]
    for chunks in batches:
        batch = make_batch(chunks, 4)
        expected = theirs.logits(theirs(batch, caches[0])[batch.logits_indices])
        ids = batch.input_ids.tolist()
        if len(chunks) > 1:
            ids = [-1 - last.tolist().index(token) if token in (11, 5, 13) else token for token in ids]
        numbers = batch.positions.tolist(), batch.slots.tolist(), batch.logits_indices.tolist()
        brought = Brought(ids, *numbers, batch.query_lens, batch.context_lens)
        assert step.fits(brought)
        singles = brought.singles
        contexts = [
            chunk.block_table[at // 4] * 4 + at % 4
            for chunk in chunks[singles:]
            for at in range(chunk.cached + len(chunk.token_ids))
        ]
        step.fill(brought, batch.block_tables[:singles], contexts)
        step.run()
        assert error(logits[: len(expected)].cpu(), expected) < (3e-3 if kv == "int8" else 1e-4)
    for mine, other in zip(caches[1].layers, caches[0].layers, strict=True):
        assert (mine.key.cpu().float() - other.key.float()).abs().max() <= (1 if kv == "int8" else 1e-3)


def test_a_step_without_logits_only_fills_the_cache() -> None:
    model = network(QWEN1).to(DEVICE)
    caches = KVCache(QWEN1, 4, 4, "fp32", DEVICE), KVCache(QWEN1, 4, 4, "fp32", DEVICE)
    for cache, logits in zip(caches, ("none", "all"), strict=True):
        batch = make_batch([Chunk(list(range(7)), 0, [2, 0], logits=logits)], 4, DEVICE)
        assert len(prefill(model, batch, cache, batch.logits_indices)) == len(batch.logits_indices)
    for with_none, with_all in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(with_none.key, with_all.key) and torch.equal(with_none.value, with_all.value)


@pytest.mark.parametrize(("layers", "odd", "run"), [(1, None, 1), (3, None, 2), (3, 1, 3), (3, 2, 2)])
def test_the_ends_of_a_network_stand_for_the_rest_where_that_is_like_them(
    layers: int, odd: int | None, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(QWEN1, num_layers=layers)
    model = network(config).to(DEVICE)
    for index, layer in enumerate(model.layers):
        linear = layer.mlp.down_proj
        zeros = "whole" if index == odd else "middle"
        linear.packed = pack_blocked(quantized(8, *linear.weight.shape, 32, zeros), torch.float32, DEVICE)
        linear.weight = None
    seen: list[int] = []
    attend = prefill_module._attend
    monkeypatch.setattr(
        prefill_module, "_attend", lambda attention, index, *rest: seen.append(index) or attend(attention, index, *rest)
    )
    step = PromptStep(model, KVCache(config, 2, 4, "fp32", DEVICE), 8, torch.device(DEVICE))
    step.run(ends=True)
    assert seen == list(range(run))
    seen.clear()
    step.run()
    assert seen == list(range(layers))
