"""Draws among the few likeliest tokens on the GPU, without sorting a row of 152k logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.greedy import NEVER, real_logits
from qwenfit.kernels.triton.launch import options, start_after_previous

_TILE = 2048
LOWEST = tl.constexpr(-(2**63))


def draw_top_k_reference(
    logits: torch.Tensor, vocab_size: int, knobs: torch.Tensor, banned: torch.Tensor | None = None
) -> torch.Tensor:
    """logits float32 [B, rows of the head] -> int64 [B] of the first `vocab_size`; -1 where not all are finite.

    knobs float64 [5, B]: temperature, top_k (1: the greedy choice), top_p, min_p, and a number in [0, 1),
    at which the softmax of what is kept is drawn, the likeliest first. banned: uint8 [vocab_size], not 0: never drawn.
    """
    real = logits[:, :vocab_size]
    if banned is not None:
        real = real.masked_fill(banned != 0, NEVER)
    temperature, top_k, top_p, min_p, u = (knob[:, None] for knob in knobs)
    kept, ids = real.sort(descending=True, stable=True)
    kept = ((kept - kept[:, :1]) / temperature.float()).exp().double()
    kept = kept.where(torch.arange(kept.shape[1], device=kept.device) < top_k, 0.0)
    cumulative = kept.cumsum(-1)
    kept = kept.where(((top_p == 1) | (cumulative - kept < top_p * cumulative[:, -1:])) & (kept >= min_p), 0.0)
    cumulative = kept.cumsum(-1)
    at = (cumulative <= u * cumulative[:, -1:]).sum(-1, keepdim=True).clamp(max=real.shape[1] - 1)
    return torch.where(real.isfinite().all(1), ids.gather(1, at)[:, 0], -1)


def draw_top_k(
    logits: torch.Tensor, vocab_size: int, knobs: torch.Tensor, most: int, banned: torch.Tensor | None = None
) -> torch.Tensor:
    """`draw_top_k_reference` in two kernels; `most`: the largest top_k of the rows, at most some hundred.

    The largest logits are taken one by one, first of each part of a row and then of all its parts.
    """
    batch = logits.shape[0]
    parts = triton.cdiv(vocab_size, _TILE)
    keys = torch.empty(batch, parts, most, dtype=torch.int64, device=logits.device)
    bad = torch.empty(batch, parts, dtype=torch.int32, device=logits.device)
    out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    _keys_of_part[(parts, batch)](
        logits, logits if banned is None else banned, keys, bad, logits.stride(0), vocab_size, most,
        HAS_BANNED=banned is not None, NEVER=NEVER, TILE=_TILE, num_warps=4, **options(logits),
    )  # fmt: skip
    _draw_of_row[(batch,)](
        keys, bad, knobs, out, batch, parts, most, K=max(32, triton.next_power_of_2(most)),
        LANES=triton.next_power_of_2(parts), num_warps=8, **options(logits),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["most"])
def _keys_of_part(
    logits_ptr, banned_ptr, keys_ptr, bad_ptr, stride, vocab, most,
    HAS_BANNED: tl.constexpr, NEVER: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """The largest logits of a part, as integers of their order: the float's bits, and below them who comes first."""
    start_after_previous(OVERLAP)
    part, row = tl.program_id(0), tl.program_id(1)
    i = part * TILE + tl.arange(0, TILE)
    x, bad = real_logits(logits_ptr + row.to(tl.int64) * stride, banned_ptr, i, vocab, HAS_BANNED, NEVER)
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0.0 is no less
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)
    keys = (order << 32) | (0x7FFFFFFF - i).to(tl.int64)
    at = row * tl.num_programs(0) + part
    tl.store(bad_ptr + at, bad.to(tl.int32))
    keys_ptr += at.to(tl.int64) * most
    for rank in range(most):
        top = tl.max(keys, axis=0)
        tl.store(keys_ptr + rank, top)
        keys = tl.where(keys == top, LOWEST, keys)


@triton.jit(do_not_specialize=["batch", "most"])
def _draw_of_row(
    keys_ptr, bad_ptr, knobs_ptr, out_ptr, batch, parts, most,
    K: tl.constexpr, LANES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    row = tl.program_id(0)
    i = tl.arange(0, LANES * K)
    keys = tl.load(keys_ptr + row.to(tl.int64) * parts * most + i, mask=i < parts * most, other=LOWEST)
    rank = tl.arange(0, K)
    best = tl.full([K], LOWEST, tl.int64)
    for r in range(most):
        top = tl.max(keys, axis=0)
        best = tl.where(rank == r, top, best)
        keys = tl.where(keys == top, LOWEST, keys)
    order = (best >> 32).to(tl.int32)
    x = (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    temperature = tl.load(knobs_ptr + row).to(tl.float32)
    top_k = tl.load(knobs_ptr + batch + row)
    top_p = tl.load(knobs_ptr + 2 * batch + row)
    min_p = tl.load(knobs_ptr + 3 * batch + row)
    u = tl.load(knobs_ptr + 4 * batch + row)
    there = rank < tl.minimum(most, top_k)
    highest = tl.max(tl.where(there, x, -1e38), axis=0)
    kept = tl.where(there, tl.exp((x - highest) / temperature), 0.0).to(tl.float64)
    before = tl.cumsum(kept, axis=0) - kept
    limit = tl.where(top_p == 1.0, 2.0 * K, top_p * tl.sum(kept, axis=0))
    kept = tl.where(before < limit, kept, 0.0)
    kept = tl.where(kept >= min_p, kept, 0.0)
    cumulative = tl.cumsum(kept, axis=0)
    at = tl.sum((cumulative <= u * tl.max(cumulative, axis=0)).to(tl.int32), axis=0)
    index = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
    chosen = tl.sum(tl.where(rank == tl.minimum(at, K - 1), index, 0), axis=0)
    lane = tl.arange(0, LANES)
    bad = tl.max(tl.load(bad_ptr + row * parts + lane, mask=lane < parts, other=0), axis=0)
    tl.store(out_ptr + row, tl.where(bad > 0, -1, chosen).to(tl.int64))
