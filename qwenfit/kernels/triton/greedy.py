"""Greedy choice on the GPU, and the step from one decoded token to the next without the host."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.launch import options, start_after_previous

_TILE = 2048


def greedy_reference(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """logits [B, rows of the head] -> int64 [B]: the first largest of the first `vocab_size`; -1: not all finite."""
    real = logits[:, :vocab_size]
    return torch.where(real.isfinite().all(1), real.argmax(1), -1)


def greedy(logits: torch.Tensor, vocab_size: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """`greedy_reference` in two kernels; logits float32 with contiguous rows."""
    batch = logits.shape[0]
    parts = triton.cdiv(vocab_size, _TILE)
    top = torch.empty(batch, parts, dtype=torch.float32, device=logits.device)
    where = torch.empty(batch, parts, dtype=torch.int32, device=logits.device)
    if out is None:
        out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    _top_of_part[(parts, batch)](
        logits, top, where, logits.stride(0), vocab_size, TILE=_TILE, num_warps=8, **options(logits)
    )
    _top_of_row[(batch,)](top, where, out, parts, LANES=triton.next_power_of_2(parts), **options(logits))
    return out


@triton.jit
def _top_of_part(logits_ptr, top_ptr, where_ptr, stride, vocab, TILE: tl.constexpr, OVERLAP: tl.constexpr):
    start_after_previous(OVERLAP)
    part, row = tl.program_id(0), tl.program_id(1)
    i = part * TILE + tl.arange(0, TILE)
    x = tl.load(logits_ptr + row.to(tl.int64) * stride + i, mask=i < vocab, other=-1e38)
    bad = tl.sum((tl.abs(x) <= 3.4e38).to(tl.int32), axis=0) < TILE  # NaN compares false
    x = tl.where(tl.abs(x) <= 3.4e38, x, -1e38)
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


def advance(
    tokens: torch.Tensor,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    context_lens: torch.Tensor,
    block_tables: torch.Tensor,
    block_size: int,
) -> None:
    """Make the next step of sequences that each got one of `tokens` int64 [B]; all but the tables change in place.

    Rows of context length 0 (padding) stay as they are. The block of the next token must be in the table already.
    """
    _advance[(len(tokens),)](
        tokens, input_ids, positions, slots, context_lens, block_tables, block_tables.stride(0),
        BLOCK_SIZE=block_size, num_warps=1, **options(tokens),
    )  # fmt: skip


@triton.jit
def _advance(
    tokens_ptr, ids_ptr, positions_ptr, slots_ptr, context_ptr, table_ptr, table_stride,
    BLOCK_SIZE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    row = tl.program_id(0)
    context = tl.load(context_ptr + row)
    if context > 0:
        tl.store(ids_ptr + row, tl.maximum(tl.load(tokens_ptr + row), 0))
        tl.store(positions_ptr + row, context)
        block = tl.load(table_ptr + row * table_stride + context // BLOCK_SIZE).to(tl.int64)
        tl.store(slots_ptr + row, block * BLOCK_SIZE + context % BLOCK_SIZE)
        tl.store(context_ptr + row, context + 1)
