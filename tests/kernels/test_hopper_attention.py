"""attention.cu, compiled for a CPU with a Hopper's instructions emulated (emulated_hopper.h), against its reference."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.emulated_hopper import Map, emulated
from tests.kernels.triton_cases import error, poisoned, random

pytest.importorskip("triton")
from qwenfit.kernels.attention import LayerCache, RaggedStep
from qwenfit.kernels.hopper import attention
from qwenfit.kernels.hopper.attention import KEYS, QUERIES, hopper_attention
from qwenfit.kernels.hopper.instructions import wgmma, wgmma_held
from qwenfit.kernels.rotary import both_halves, rotate
from qwenfit.kernels.triton import prompt_attention, ragged
from qwenfit.kernels.triton.decode_attention import NewTokens
from qwenfit.kernels.triton.prompt_attention import Turn, prompt_attention_reference, tiles_of
from qwenfit.kernels.triton.ragged import ragged_attention, ragged_attention_reference, ragged_plan
from qwenfit.model.rotary import inverse_frequencies

BF16 = torch.bfloat16
MAIN = """
extern "C" void run(TensorMap* k, TensorMap* v, const u16* q, u16* out, const float* cos, const float* sin,
                    const u16* query_scale, const int* query_starts, const int* context_starts, const int* tiles,
                    const int* before, long long q_stride, float scale, int heads, int group, int jobs, int rows,
                    int grid, int bytes) {
    run_clusters(grid, 1, THREADS + 128, THREADS, bytes, [=] {
        hopper_attention(*k, *v, q, out, cos, sin, query_scale, query_starts, context_starts, tiles, before, q_stride,
                         scale, heads, group, jobs, rows);
    });
}
"""
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
LENGTHS = {
    "one": ([1], [1]),
    "a prompt": ([300], [300]),
    "whole tiles": ([256], [256]),
    "whole prompts": ([130, 3, 200], [130, 3, 200]),
    "parts of prompts": ([7, 130, 128, 1], [200, 130, 384, 140]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


def numbers(queries: list[int], contexts: list[int], more: list[tuple[int, int]] | None = None) -> list[torch.Tensor]:
    """Where the rows of each prompt begin, and the tiles, and `more` of these: as the kernel takes them."""
    tiles = tiles_of(queries, contexts, QUERIES) + (more or [])
    each = [[*accumulate(queries, initial=0)], [*accumulate(contexts, initial=0)], tiles]
    return [torch.tensor(n, dtype=torch.int32) for n in each]


def attend(
    folder: Path,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    tables: list[torch.Tensor],
    out: torch.Tensor,
    turn: Turn | None = None,
    before: torch.Tensor | None = None,
    programs: int = 3,
) -> torch.Tensor:
    """What `hopper_attention` does on a card with so few cores, with a scale of 0.1."""
    (_, heads, dim), kv_heads, jobs = q.shape, k.shape[1], q.shape[1] * len(tables[2])
    cos, sin, query_scale = turn or (None, None, None)
    maps = [Map(x.data_ptr(), kv_heads * dim, len(x), x.stride(0), KEYS) for x in (k, v)]
    tensors = (q, out, cos, sin, query_scale, *tables, before)
    emulated(folder, attention.source(dim), MAIN, wgmma(KEYS), wgmma_held(dim)).run(
        *map(ctypes.byref, maps), *(ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors),
        ctypes.c_longlong(q.stride(0)), ctypes.c_float(0.1 * 1.4426950408889634), heads, heads // kv_heads, jobs,
        len(q), min(programs, jobs), attention.shared_bytes(dim),
    )  # fmt: skip
    return out


def operands(queries: list[int], contexts: list[int], heads: int, kv_heads: int, dim: int) -> list[torch.Tensor]:
    """q, k and v, each a view of some heads among others; neighbours in memory are NaN."""
    made = []
    for i, (rows, count) in enumerate(((sum(queries), heads), (sum(contexts), kv_heads), (sum(contexts), kv_heads))):
        around = poisoned(rows, count + 3, dim, dtype=BF16).cpu()
        around[:, 2 : 2 + count] = random(rows, count, dim, dtype=BF16, seed=i).cpu() * (3 if i == 0 else 1)
        made.append(around[:, 2 : 2 + count])
    return made


def expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, queries: list[int], contexts: list[int]
) -> torch.Tensor:
    return prompt_attention_reference(q.float(), k.float(), v.float(), queries, contexts, 0.1)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 128), (3, 1, 64)])
def test_prompts(folder: Path, heads: int, kv_heads: int, dim: int, lengths: tuple[list[int], list[int]]) -> None:
    q, k, v = operands(*lengths, heads, kv_heads, dim)
    out = poisoned(len(q), heads, dim, dtype=BF16).cpu()
    attend(folder, q, k, v, numbers(*lengths), out)
    assert error(out, expected(q, k, v, *lengths)) < 4e-3


def turn_of(tokens: int, dim: int, scaled: bool) -> Turn:
    radians = torch.arange(tokens)[:, None] * inverse_frequencies(dim, 1e4)
    factor = (1 + torch.arange(tokens)[:, None, None] / 50).to(BF16) if scaled else None
    return Turn(*both_halves(radians.cos(), radians.sin()), factor)


@pytest.mark.parametrize(("dim", "scaled"), [(128, False), (128, True), (64, True)])
def test_queries_are_rotated_as_they_are_read(folder: Path, dim: int, scaled: bool) -> None:
    queries, contexts = [140, 3], [140, 90]
    q, k, v = operands(queries, contexts, 2, 1, dim)
    turn, out = turn_of(143, dim, scaled), poisoned(143, 2, dim, dtype=BF16).cpu()
    attend(folder, q, k, v, numbers(queries, contexts), out, turn)
    turned = rotate(q, turn.cos, turn.sin)
    turned = turned if turn.query_scale is None else turned * turn.query_scale
    assert error(out, expected(turned, k, v, queries, contexts)) < 4e-3


def test_rows_of_other_sequences_are_left_alone(folder: Path) -> None:
    """Those before the prompts, and those after them; a tile beyond a prompt's queries is no work, one beyond all rows
    the end.
    """
    queries = [140, 13]
    q, k, v = operands([200], queries, 2, 2, 64)
    tables = numbers(queries, queries, [(1, 128), (0, 200), (0, 0)])
    before, out = torch.tensor([7], dtype=torch.int32), torch.full((200, 2, 64), 5.0, dtype=BF16)
    attend(folder, q, k, v, tables, out, before=before)
    assert error(out[7:160], expected(q[7:160], k, v, queries, queries)) < 4e-3
    assert bool((out[:7] == 5).all() and (out[160:] == 5).all())


def test_what_is_not_a_number_stays_with_its_prompt(folder: Path) -> None:
    """Keys and values of the next prompt are in the same block as a prompt's last."""
    queries = [130, 200, 40]
    q, k, v = operands(queries, queries, 1, 1, 128)
    k[130:330], v[130:330] = torch.nan, torch.nan
    out = attend(folder, q, k, v, numbers(queries, queries), poisoned(370, 1, 128, dtype=BF16).cpu())
    for rows, length in ((slice(0, 130), 130), (slice(330, 370), 40)):
        assert error(out[rows], expected(q[rows], k[rows], v[rows], [length], [length])) < 4e-3
    assert bool(out[130:330].isnan().all())


def test_every_number_of_programs_gives_the_same(folder: Path) -> None:
    queries, contexts = [300, 150, 257], [300, 400, 257]
    q, k, v = operands(queries, contexts, 2, 2, 64)
    first, *others = (
        attend(folder, q, k, v, numbers(queries, contexts), poisoned(707, 2, 64, dtype=BF16).cpu(), programs=programs)
        for programs in (1, 2, 5, 16)
    )
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.skipif(torch.cuda.is_available(), reason="plays a step on a CPU")
def test_a_step_with_prompts_takes_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a single token, with a prompt that goes on: it gets what it takes."""

    def play(*operands: Any) -> torch.Tensor:
        q, k, v, query_starts, context_starts, tiles, scale, turn, before, out = operands
        assert scale == 0.1
        return attend(folder, q, k, v, [query_starts, context_starts, tiles], out, turn, before)

    monkeypatch.setattr(prompt_attention, "hopper_attention", play)
    dim, heads, kv_heads, size, queries, contexts = 64, 4, 2, 16, [1, 140, 20], [30, 140, 60]
    tables = torch.randperm(48, generator=torch.Generator().manual_seed(0)).view(3, 16).int()
    at = [(i, p) for i, (n, end) in enumerate(zip(queries, contexts, strict=True)) for p in range(end - n, end)]
    slots = torch.tensor([int(tables[i, p // size]) * size + p % size for i, p in at])
    turn = turn_of(161, dim, True)
    new = NewTokens(turn.cos, turn.sin, turn.query_scale, None, 1e-6, slots)
    qkv = random(161, heads + 2 * kv_heads, dim, dtype=BF16)
    stored = random(2, 48, size, kv_heads, dim, dtype=BF16, seed=1)
    step = RaggedStep(queries, contexts, tables, slots, size, BF16)
    cache, wide = LayerCache(*stored.clone()), LayerCache(*stored.float())
    expected = ragged_attention_reference(qkv.float(), new, wide, replace(step, dtype=torch.float32), 0.1)
    monkeypatch.setattr(ragged, "prompt_config", lambda *_: ragged.HOPPER_LONG)
    out = ragged_attention(qkv, new, cache, ragged_plan(step, heads, cache), 0.1)
    assert error(out[1:], expected[1:]) < 6e-3
    assert error(cache.key, wide.key) < 3e-3


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("lengths", [*LENGTHS.values(), ([2048], [2048]), ([1000, 2, 600], [9000, 2, 600])], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 32, 128), (14, 2, 64), (28, 4, 128)])
def test_on_the_card_itself(heads: int, kv_heads: int, dim: int, lengths: tuple[list[int], list[int]]) -> None:
    if missing := attention.why_not(torch.device("cuda", 0), dim):
        pytest.skip(missing)
    q, k, v = (x.cuda() for x in operands(*lengths, heads, kv_heads, dim))
    tables = [x.cuda() for x in numbers(*lengths)]
    turn = Turn(*(None if x is None else x.cuda() for x in turn_of(len(q), dim, True)))  # type: ignore[arg-type]
    out = poisoned(len(q), heads, dim, dtype=BF16)
    hopper_attention(q, k, v, *tables, 0.1, turn, None, out)  # type: ignore[arg-type]
    turned = rotate(q, turn.cos, turn.sin) * turn.query_scale
    assert error(out, expected(turned, k, v, *lengths)) < 4e-3
