"""Greedy choice on the GPU."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.launch import options, start_after_previous

_TILE = 2048
NEVER = -1e37  # finite, and below every logit


def greedy_reference(logits: torch.Tensor, vocab_size: int, banned: torch.Tensor | None = None) -> torch.Tensor:
    """logits [B, rows of the head] -> int64 [B]: the first largest of the first `vocab_size`; -1: not all finite.

    banned: uint8 [vocab_size], not 0 for what is never chosen, whatever its logit.
    """
    real = logits[:, :vocab_size]
    if banned is not None:
        real = real.masked_fill(banned != 0, NEVER)
    return torch.where(real.isfinite().all(1), real.argmax(1), -1)


def greedy(
    logits: torch.Tensor,
    vocab_size: int,
    banned: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`greedy_reference` in two kernels, in `out` if given; logits float32 with contiguous rows."""
    batch = logits.shape[0]
    parts = triton.cdiv(vocab_size, _TILE)
    top = torch.empty(batch, parts, dtype=torch.float32, device=logits.device)
    where = torch.empty(batch, parts, dtype=torch.int32, device=logits.device)
    if out is None:
        out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    _top_of_part[(parts, batch)](
        logits, logits if banned is None else banned, top, where, logits.stride(0), vocab_size,
        HAS_BANNED=banned is not None, TILE=_TILE, NEVER=NEVER, num_warps=8, **options(logits),
    )  # fmt: skip
    _top_of_row[(batch,)](top, where, out, parts, LANES=triton.next_power_of_2(parts), **options(logits))
    return out


@triton.jit
def real_logits(logits_ptr, banned_ptr, i, vocab, HAS_BANNED: tl.constexpr, NEVER: tl.constexpr):
    """The logits `i` [n] of a row, what is no token or not finite below all others; and whether some are not finite."""
    x = tl.load(logits_ptr + i, mask=i < vocab, other=-1e38)
    if HAS_BANNED:
        x = tl.where(tl.load(banned_ptr + i, mask=i < vocab, other=0) != 0, NEVER, x)
    finite = tl.abs(x) <= 3.4e38  # NaN compares false
    return tl.where(finite, x, -1e38), tl.sum(finite.to(tl.int32), axis=0) < i.shape[0]


@triton.jit
def _top_of_part(
    logits_ptr, banned_ptr, top_ptr, where_ptr, stride, vocab,
    HAS_BANNED: tl.constexpr, TILE: tl.constexpr, NEVER: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    part, row = tl.program_id(0), tl.program_id(1)
    i = part * TILE + tl.arange(0, TILE)
    x, bad = real_logits(logits_ptr + row.to(tl.int64) * stride, banned_ptr, i, vocab, HAS_BANNED, NEVER)
    value, index = tl.max(x, axis=0, return_indices=True)
    at = row * tl.num_programs(0) + part
    tl.store(top_ptr + at, value)
    tl.store(where_ptr + at, tl.where(bad, -1, part * TILE + index))


@triton.jit
def _top_of_row(top_ptr, where_ptr, out_ptr, parts, LANES: tl.constexpr, OVERLAP: tl.constexpr):
    start_after_previous(OVERLAP)
    row = tl.program_id(0)
    i = tl.arange(0, LANES)
    value = tl.load(top_ptr + row * parts + i, mask=i < parts, other=-3e38)
    where = tl.load(where_ptr + row * parts + i, mask=i < parts, other=0)
    highest = tl.max(value, axis=0)
    first = tl.min(tl.where((value == highest) & (i < parts), where, 0x7FFFFFFF), axis=0)
    bad = tl.min(where, axis=0) < 0
    tl.store(out_ptr + row, tl.where(bad, -1, first).to(tl.int64))
