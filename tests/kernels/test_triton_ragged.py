from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.test_triton_attention import BLOCK_SIZE, filled
from tests.kernels.triton_cases import DEVICE, error, random

pytest.importorskip("triton")
from qwenfit.kernels.attention import LayerCache, RaggedStep
from qwenfit.kernels.rotary import both_halves
from qwenfit.kernels.triton import ragged
from qwenfit.kernels.triton.decode_attention import NewTokens
from qwenfit.kernels.triton.ragged import (
    gather_context,
    gather_context_reference,
    ragged_attention,
    ragged_attention_reference,
    ragged_plan,
)
from qwenfit.model.rotary import inverse_frequencies

STEPS = {
    "single tokens, a prompt, one that goes on": ([1, 1, 7, 5], [10, 3, 7, 13]),
    "whole prompts": ([7, 3], [7, 3]),
    "single tokens": ([1, 1], [1, 9]),
    "a single token after a prompt": ([4, 1], [4, 6]),
}


def on_cpu(cache: LayerCache) -> LayerCache:
    tensors = (cache.key, cache.value, cache.key_affine, cache.value_affine)
    return LayerCache(*(None if t is None else t.cpu() for t in tensors))  # type: ignore[arg-type]


def new_tokens(positions: list[int], slots: torch.Tensor, dim: int, kv_heads: int, plain: bool) -> NewTokens:
    radians = torch.tensor(positions)[:, None] * inverse_frequencies(dim, 1e4)
    return NewTokens(
        *both_halves(radians.cos(), radians.sin()),
        None if plain else 1 + torch.arange(len(positions))[:, None, None] / 10,
        None if plain else (random(dim).cpu() + 2, random(dim, seed=1).cpu() + 2),
        1e-6,
        slots,
        None if plain else random(kv_heads, dim).cpu(),
    )


def moved(new: NewTokens) -> NewTokens:
    fields = ("cos", "sin", "query_scale", "slots", "key_centre")
    there = {name: value.to(DEVICE) for name in fields if (value := getattr(new, name)) is not None}
    norms = new.head_norms and tuple(norm.to(DEVICE) for norm in new.head_norms)
    return replace(new, **there, head_norms=norms)  # type: ignore[arg-type]


@pytest.mark.parametrize("own", [False, True], ids=["torch", "own kernel"])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "plain"), [(2, 2, True), (4, 2, False)])
def test_prompts_chunks_and_single_tokens_in_one_step(
    heads: int, kv_heads: int, plain: bool, quantized: bool, name: str, own: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel of our own rotates the queries that it reads, where no norm comes before."""
    if own:
        monkeypatch.setattr(ragged, "prompt_config", lambda *_: {"m": 16, "n": 16, "warps": 1, "stages": 1})
    dim, (queries, contexts) = 16, STEPS[name]
    ours, theirs = filled(kv_heads, dim, 20, quantized), on_cpu(filled(kv_heads, dim, 20, quantized))
    tables = torch.randperm(20, generator=torch.Generator().manual_seed(0))[: 4 * len(queries)].view(-1, 4).int()
    at = [(i, p) for i, (n, end) in enumerate(zip(queries, contexts, strict=True)) for p in range(end - n, end)]
    slots = torch.tensor([int(tables[i, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE for i, p in at])
    new = new_tokens([p for _, p in at], slots, dim, kv_heads, plain)
    qkv = random(len(at), heads + 2 * kv_heads, dim)
    on_host = RaggedStep(queries, contexts, tables, slots, BLOCK_SIZE, torch.float32)
    expected = ragged_attention_reference(qkv.cpu(), new, theirs, on_host, 0.25)
    step = RaggedStep(queries, contexts, tables.to(DEVICE), slots.to(DEVICE), BLOCK_SIZE, torch.float32)
    out = ragged_attention(qkv, moved(new), ours, ragged_plan(step, heads, ours), 0.25)
    assert error(out.cpu(), expected) < (2e-3 if quantized else 1e-5)
    for field in ("key", "value", "key_affine", "value_affine"):
        if getattr(theirs, field) is not None:
            mine, other = getattr(ours, field).float().cpu(), getattr(theirs, field).float()
            assert (mine - other).abs().max() <= (1 if field in ("key", "value") and quantized else 1e-3)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_context_is_read_back_from_scattered_slots(quantized: bool) -> None:
    cache = filled(3, 16, 6, quantized)
    slots = torch.tensor([5, 0, 23, 7, 7, -1], device=DEVICE)
    expected = gather_context_reference(cache, slots[:5], torch.float32)
    for got, wanted in zip(gather_context(cache, slots, torch.float32), expected, strict=True):
        assert error(got[:5], wanted) < 1e-6


def test_the_attention_of_prompts_is_compiled_with_every_config_of_its_shape(monkeypatch) -> None:
    """One launch for each config that differs, and none of another head size or of cuDNN's."""
    used = []
    configs = {
        "prompt_attention 16 2 64": {"m": 16, "n": 16, "warps": 1, "stages": 1},
        "prompt_attention 16 2 128": {"m": 16, "n": 16, "warps": 1, "stages": 1},
        "prompt_attention 16 2 256": {"m": 32, "n": 16, "warps": 1, "stages": 1},
        "prompt_attention 16 2 512": {"cudnn": 1},
        "prompt_attention 32 2 64": {"m": 64, "n": 16, "warps": 1, "stages": 1},
    }
    monkeypatch.setattr(ragged, "in_force", lambda: configs)
    monkeypatch.setattr(ragged, "prompt_attention", lambda *operands: used.append(operands[7]["m"]))
    ragged.compile_prompt_attention(random(5, 8, 16), kv_heads=2, turn=None)
    assert used == [16, 32]
