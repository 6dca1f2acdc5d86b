"""Which products of a step the Hopper's kernel takes, played with its reference in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.test_triton_decode_step import QWEN1, QWEN3, network
from tests.kernels.triton_cases import DEVICE, error

pytest.importorskip("triton")
from qwenfit.config import ModelConfig
from qwenfit.kernels.triton import product
from qwenfit.kernels.triton.bf16_matvec import bf16_matvec_reference
from qwenfit.model import prefill as prefill_module
from qwenfit.model.batch import Chunk, make_batch
from qwenfit.model.decode import DecodeStep
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.prefill import prefill
from qwenfit.model.transformer import Transformer

Taken = list[tuple[int, ...]]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """The shapes of the weights that the kernel is given; no other kernel of few rows is there."""
    seen: Taken = []

    def play(
        x: torch.Tensor, weight: torch.Tensor, bias: Any, residual: Any, gated: bool, *_: Any, **__: Any
    ) -> torch.Tensor:
        seen.append(tuple(weight.shape))
        y = bf16_matvec_reference(x, weight, bias, residual, gated=gated)
        return y if residual is None else residual.copy_(y)

    def takes(weight: object, rows: int, dtype: torch.dtype) -> bool:
        return isinstance(weight, torch.Tensor)

    monkeypatch.setattr(product, "MATVEC_ROWS", 0)
    monkeypatch.setattr(product, "TILES_ROWS", (0, -1))
    monkeypatch.setattr(product, "hopper_product", lambda x, weight, bias=None, residual=None, gated=False, *rest,
                        **named: play(x, weight, bias, residual, gated))  # fmt: skip
    monkeypatch.setattr(product, "takes_hopper", takes)
    monkeypatch.setattr(prefill_module, "takes_hopper", takes)
    return seen


def shapes(model: Transformer) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Weights of a layer beside attention, and of its MLP."""
    attention, mlp = model.layers[0].self_attn, model.layers[0].mlp
    beside = [tuple(linear.weight.shape) for linear in (attention.qkv_proj, attention.o_proj)]  # type: ignore[union-attr]
    return beside, [tuple(linear.weight.shape) for linear in (mlp.gate_up_proj, mlp.down_proj)]  # type: ignore[union-attr]


@pytest.mark.parametrize("config", [QWEN1, QWEN3], ids=["Qwen-1", "Qwen3"])
def test_a_decoding_step_leaves_the_products_beside_attention_to_others(config: ModelConfig, taken: Taken) -> None:
    """Programs that hold all of a core's shared memory slow attention: 256 requests of Qwen-7B took 2.7 % longer."""
    plain, model = network(config), network(config).to(DEVICE)
    caches = KVCache(config, 8, 4, "fp32"), KVCache(config, 8, 4, "fp32", DEVICE)
    step = DecodeStep(model, caches[1], 3, 1, torch.device(DEVICE))
    step.buffers.input_ids.copy_(torch.tensor([5, 6, 7]))
    step.buffers.positions.zero_()
    step.buffers.context_lens.fill_(1)
    step.buffers.block_tables.copy_(torch.tensor([[2], [4], [1]]))
    step.buffers.slots.copy_(torch.tensor([8, 16, 4]))
    logits = step.run()
    batch = make_batch([Chunk([5 + i], 0, [block]) for i, block in enumerate((2, 4, 1))], 4)
    assert error(logits.cpu(), plain.logits(plain(batch, caches[0]))) < 1e-4
    _, mlp = shapes(model)
    assert taken == [*mlp * config.num_layers, (config.vocab_size, config.hidden_size)]


@pytest.mark.parametrize("config", [QWEN1, QWEN3], ids=["Qwen-1", "Qwen3"])
def test_whole_prompts_take_it_for_all_products_and_other_steps_for_the_mlp(config: ModelConfig, taken: Taken) -> None:
    plain, model = network(config), network(config).to(DEVICE)
    caches = KVCache(config, 12, 4, "fp32"), KVCache(config, 12, 4, "fp32", DEVICE)
    beside, mlp = shapes(model)
    for chunks, near in (
        ([Chunk(list(range(5)), 0, [3, 1]), Chunk([9, 8, 7], 0, [4])], False),
        ([Chunk([11], 5, [3, 1]), Chunk([1, 2], 0, [6])], True),  # one that decodes
        ([Chunk([4, 5], 3, [4, 7])], True),  # a second part, which reads what is in the cache
    ):
        taken.clear()
        hidden = plain(make_batch(chunks, 4), caches[0])
        assert error(prefill(model, make_batch(chunks, 4, DEVICE), caches[1]).cpu(), hidden) < 1e-4
        assert taken == [*(mlp if near else beside + mlp) * config.num_layers]
