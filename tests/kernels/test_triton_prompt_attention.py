from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from tests.kernels.triton_cases import DEVICE, error, random

pytest.importorskip("triton")
from qwenfit.kernels.rotary import both_halves, rotate
from qwenfit.kernels.triton.prompt_attention import Turn, prompt_attention, prompt_attention_reference, tiles_of
from qwenfit.model.rotary import inverse_frequencies

CONFIGS = [{"m": 16, "n": 16, "warps": 1, "stages": 2}, {"m": 32, "n": 16, "warps": 2, "stages": 1}]
LENGTHS = {
    "one": ([1], [1]),
    "whole prompts": ([40, 3, 17], [40, 3, 17]),
    "parts of prompts": ([5, 33, 16], [48, 33, 31]),
}


def tables(queries: list[int], contexts: list[int], m: int) -> list[torch.Tensor]:
    """Where the rows of each prompt begin, and the programs: as the kernel takes them."""
    numbers = [[*accumulate(queries, initial=0)], [*accumulate(contexts, initial=0)], tiles_of(queries, contexts, m)]
    return [torch.tensor(each, dtype=torch.int32, device=DEVICE) for each in numbers]


@pytest.mark.parametrize("config", CONFIGS, ids=["16x16", "32x16"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 16), (6, 2, 32)])
def test_prompt_attention(
    heads: int, kv_heads: int, dim: int, lengths: tuple[list[int], list[int]], config: dict[str, int]
) -> None:
    queries, contexts = lengths
    together = random(sum(queries), heads + 5, dim)
    q = together[:, 2:-3]  # as a view into projected heads
    k, v = random(sum(contexts), kv_heads, dim, seed=1), random(sum(contexts), kv_heads, dim, seed=2)
    out = prompt_attention(q, k, v, *tables(queries, contexts, config["m"]), 0.3, config)
    assert error(out, prompt_attention_reference(q, k, v, queries, contexts, 0.3)) < 1e-5


def test_sixteen_bits_round_the_weights_of_the_values_too() -> None:
    q, k, v = (random(40, 2, 16, dtype=torch.float16, seed=i) for i in range(3))
    out = prompt_attention(q, k, v, *tables([40], [40], 16), 0.3, CONFIGS[0])
    expected = prompt_attention_reference(q.float(), k.float(), v.float(), [40], [40], 0.3)
    assert 1e-5 < error(out, expected) < 1e-3


@pytest.mark.parametrize("scaled", [False, True])
def test_queries_are_rotated_as_they_are_read(scaled: bool) -> None:
    queries, contexts, dim = [40, 3, 17], [40, 9, 17], 16
    q, k, v = random(60, 2, dim), random(66, 2, dim, seed=1), random(66, 2, dim, seed=2)
    radians = torch.arange(60, device=DEVICE)[:, None] * inverse_frequencies(dim, 1e4).to(DEVICE)
    cos, sin = both_halves(radians.cos(), radians.sin())
    factor = 1 + torch.arange(60, device=DEVICE)[:, None, None] / 50 if scaled else None
    out = prompt_attention(q, k, v, *tables(queries, contexts, 16), 0.3, CONFIGS[0], Turn(cos, sin, factor))
    turned = rotate(q, cos, sin)
    turned = turned if factor is None else turned * factor
    assert error(out, prompt_attention_reference(turned, k, v, queries, contexts, 0.3)) < 1e-5


def test_tiles_that_read_the_most_come_first() -> None:
    assert tiles_of([5, 40, 16], [5, 40, 100], 16) == [(2, 0), (1, 32), (1, 16), (1, 0), (0, 0)]
    assert tiles_of([], [], 16) == []


def test_rows_of_other_sequences_are_left_alone() -> None:
    """Those before the prompts, and those after them; a tile beyond a prompt's queries is no work."""
    q, k, v = random(60, 2, 16), random(33, 2, 16, seed=1), random(33, 2, 16, seed=2)
    *starts, tiles = tables([20, 13], [20, 13], 16)
    tiles = torch.cat((tiles, tiles.new_tensor([[0, 60], [1, 16]])))
    before, out = torch.tensor([7], dtype=torch.int32, device=DEVICE), torch.full((60, 2, 16), 5.0, device=DEVICE)
    prompt_attention(q, k, v, *starts, tiles, 0.3, CONFIGS[0], before=before, out=out)
    expected = prompt_attention_reference(q[7:40], k, v, [20, 13], [20, 13], 0.3)
    assert error(out[7:40], expected) < 1e-5
    assert bool((out[:7] == 5).all() and (out[40:] == 5).all())
