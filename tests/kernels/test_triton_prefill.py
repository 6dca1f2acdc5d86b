from __future__ import annotations

import pytest
import torch

from tests.kernels.test_triton_decode_step import QWEN1, QWEN3, network
from tests.kernels.triton_cases import DEVICE, error

pytest.importorskip("triton")
from qwenfit.config import ModelConfig
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


def test_a_step_without_logits_only_fills_the_cache() -> None:
    model = network(QWEN1).to(DEVICE)
    caches = KVCache(QWEN1, 4, 4, "fp32", DEVICE), KVCache(QWEN1, 4, 4, "fp32", DEVICE)
    for cache, logits in zip(caches, ("none", "all"), strict=True):
        batch = make_batch([Chunk(list(range(7)), 0, [2, 0], logits=logits)], 4, DEVICE)
        assert len(prefill(model, batch, cache, batch.logits_indices)) == len(batch.logits_indices)
    for with_none, with_all in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(with_none.key, with_all.key) and torch.equal(with_none.value, with_all.value)
