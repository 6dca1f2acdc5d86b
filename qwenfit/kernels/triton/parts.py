"""The contexts of a step's sequences in parts of like length, each the work of one program for a head.

Were every sequence cut into as many parts, one long sequence among short ones would keep few programs busy, and the
others would wait for them. The parts of a sequence are merged by the program that is done last, or by `merge`.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.launch import options, start_after_previous

_COLUMNS = tl.constexpr(8)  # of the table of parts: 32 bytes a row
_LANES = 32
ARRIVED_STRIDE = tl.constexpr(8)  # int32 between two counters: atomics on one line of the cache wait for each other


def cut_reference(context_lens: torch.Tensor, wanted: int, tile: int) -> torch.Tensor:
    """int32 [wanted + B - 1, 8] of context_lens [B]: some `wanted` parts of one length, a multiple of `tile`.

    Of each: its sequence, its first token, the one after its last, the first part of its sequence, and how many that
    has. The parts of a sequence follow each other, in order; an empty one has an empty part; all zero is no part.
    Then, whatever that part is, the next sequence that has several: its number, its first part, and how many it has.
    """
    lengths = context_lens.tolist()
    length = max(1, -(-sum(lengths) // (wanted * tile))) * tile
    table: list[list[int]] = []
    several = []
    for row, context in enumerate(lengths):
        first, count = len(table), max(1, -(-context // length))
        starts = range(0, count * length, length)
        table += [[row, start, min(start + length, context), first, count] for start in starts]
        several += [[row, first, count]] if count > 1 else []
    table += [[0] * 5] * (wanted + len(lengths) - 1 - len(table))
    several += [[0] * 3] * (len(table) - len(several))
    table = [part + sequence for part, sequence in zip(table, several, strict=True)]
    return torch.tensor(table, dtype=torch.int32, device=context_lens.device)


def cut(context_lens: torch.Tensor, wanted: int, tile: int) -> torch.Tensor:
    """`cut_reference` in one kernel."""
    batch = len(context_lens)
    table = torch.empty(wanted + batch - 1, _COLUMNS.value, dtype=torch.int32, device=context_lens.device)
    _cut[(batch,)](
        context_lens, table, wanted, tile, batch, len(table), BATCH=triton.next_power_of_2(batch), LANES=_LANES,
        num_warps=1 if batch <= 32 else 4, **options(context_lens),
    )  # fmt: skip
    return table


@triton.jit(do_not_specialize=["wanted", "tile", "batch", "parts"])
def _cut(
    context_ptr, table_ptr, wanted, tile, batch, parts,
    BATCH: tl.constexpr, LANES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    row = tl.program_id(0)
    each = tl.arange(0, BATCH)
    contexts = tl.load(context_ptr + each, mask=each < batch, other=0).to(tl.int32)
    length = tl.maximum(tl.cdiv(tl.sum(contexts, axis=0), wanted * tile), 1) * tile
    counts = tl.where(each < batch, tl.maximum(tl.cdiv(contexts, length), 1), 0)
    first = tl.sum(tl.where(each < row, counts, 0), axis=0)
    count = tl.sum(tl.where(each == row, counts, 0), axis=0)
    context = tl.sum(tl.where(each == row, contexts, 0), axis=0)
    place = tl.sum(tl.where((each < row) & (counts > 1), 1, 0), axis=0)
    if count > 1:
        at = table_ptr + place * _COLUMNS
        tl.store(at + 5, row)
        tl.store(at + 6, first)
        tl.store(at + 7, count)
    for begin in range(0, count, LANES):
        part = begin + tl.arange(0, LANES)
        at, mine = table_ptr + (first + part) * _COLUMNS, part < count
        tl.store(at, row, mask=mine)
        tl.store(at + 1, part * length, mask=mine)
        tl.store(at + 2, tl.minimum((part + 1) * length, context), mask=mine)
        tl.store(at + 3, first, mask=mine)
        tl.store(at + 4, count, mask=mine)
    if row == batch - 1:
        several = place + (count > 1).to(tl.int32)
        for begin in range(0, parts, LANES):
            part = begin + tl.arange(0, LANES)
            at = table_ptr + part * _COLUMNS
            for column in tl.static_range(5):
                tl.store(at + column, 0, mask=(part >= first + count) & (part < parts))
            for column in tl.static_range(5, 8):
                tl.store(at + column, 0, mask=(part >= several) & (part < parts))


@triton.jit
def part_of(parts_ptr, context_ptr, part, SPLITS: tl.constexpr, TILE: tl.constexpr, CUT: tl.constexpr):
    """(sequence, first token, the one after the last, the sequence's first part, its number of parts) of a part.

    Of a table that `cut` made (CUT), or of one sequence in up to SPLITS parts. A part beyond the last is one whose
    number, counted from the first, is not below the number of parts.
    """
    if CUT:
        at = parts_ptr + part * _COLUMNS
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    else:
        context = tl.load(context_ptr).to(tl.int32)
        length = tl.maximum(tl.cdiv(context, SPLITS * TILE), 1) * TILE
        start = part * length
        nought = part * 0
        return nought, start, tl.minimum(start + length, context), nought, tl.maximum(tl.cdiv(context, length), 1)


def arrival_counters(count: int, device: torch.device) -> torch.Tensor:
    """Where programs that share a result count themselves: all zero before and after the kernel."""
    return torch.zeros(count * ARRIVED_STRIDE.value, dtype=torch.int32, device=device)


def room_for_parts(
    splits: int, tiles: int, size: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where `splits` programs of each tile of `size` numbers leave their parts, and its counters; none for one.

    The counters are shared by the kernels of one stream, which use them one after the other.
    """
    if splits == 1:
        return None, None
    parts = torch.empty(splits * tiles * size, dtype=torch.float32, device=device)
    return parts, _counters(triton.next_power_of_2(tiles), device)


@functools.cache
def _counters(count: int, device: torch.device) -> torch.Tensor:
    return arrival_counters(count, device)


@triton.jit
def is_last_to_arrive(arrived_ptr, counter, count):
    """Whether this program is the last of `count`. What they stored before it is there to be read."""
    tl.debug_barrier()  # all stores of this program come before the count says so
    last = tl.atomic_add(arrived_ptr + counter * ARRIVED_STRIDE, 1, sem="acq_rel", scope="gpu") >= count - 1
    if last:
        tl.store(arrived_ptr + counter * ARRIVED_STRIDE, 0)
    return last


@triton.jit
def sum_parts(y, part_ptr, arrived_ptr, tile, split, SPLITS: tl.constexpr):
    """What SPLITS programs found of a tile [N, M], added in order, and whether this program is the last to arrive.

    Only for that one the sum is there. Parts float32, those of a tile beside each other.
    """
    SIZE: tl.constexpr = y.shape[0] * y.shape[1]
    at = part_ptr + tile.to(tl.int64) * (SPLITS * SIZE)
    at += tl.arange(0, y.shape[1])[None, :] * y.shape[0] + tl.arange(0, y.shape[0])[:, None]
    tl.store(at + split * SIZE, y)
    last = is_last_to_arrive(arrived_ptr, tile, SPLITS)
    if last:
        y = tl.load(at, cache_modifier=".cg")
        for other in tl.static_range(1, SPLITS):
            y += tl.load(at + other * SIZE, cache_modifier=".cg")
    return y, last


@triton.jit
def merge_parts(
    partial_ptr, lse_ptr, out_ptr, place, row_head, used,
    MOST: tl.constexpr, AT_ONCE: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The output of a head from `used` parts, MOST at most, from number `place` on, always summed in the same order."""
    d = tl.arange(0, LANES)
    place = place.to(tl.int64)
    partial = _partial(partial_ptr, place, 0, d, used, AT_ONCE, DIM)  # asked for before anything waits
    part = tl.arange(0, MOST)
    lse = tl.load(lse_ptr + place + part, mask=part < used, other=-1e30, cache_modifier=".cg")
    top = tl.max(lse, axis=0)
    total = tl.sum(tl.where(part < used, tl.exp2(lse - top), 0.0), axis=0)
    sums = _weighted(partial, lse_ptr, place, 0, used, top, AT_ONCE)
    if MOST > AT_ONCE:
        for first in range(AT_ONCE, used, AT_ONCE):
            partial = _partial(partial_ptr, place, first, d, used, AT_ONCE, DIM)
            sums += _weighted(partial, lse_ptr, place, first, used, top, AT_ONCE)
    result = sums / tl.maximum(total, 1e-30)
    tl.store(out_ptr + row_head * DIM + d, result.to(out_ptr.dtype.element_ty), mask=d < DIM)


@triton.jit
def _partial(partial_ptr, place, first, d, used, AT_ONCE: tl.constexpr, DIM: tl.constexpr):
    part = first + tl.arange(0, AT_ONCE)
    some = (part < used)[:, None] & (d < DIM)[None, :]
    return tl.load(partial_ptr + (place + part)[:, None] * DIM + d[None, :], mask=some, other=0.0, cache_modifier=".cg")


@triton.jit
def _weighted(partial, lse_ptr, place, first, used, top, AT_ONCE: tl.constexpr):
    part = first + tl.arange(0, AT_ONCE)
    lse = tl.load(lse_ptr + place + part, mask=part < used, other=-1e30, cache_modifier=".cg")
    return tl.sum(partial * tl.exp2(lse - top)[:, None], axis=0)


def merge(
    partial: torch.Tensor,
    lse: torch.Tensor,
    out: torch.Tensor,
    context_lens: torch.Tensor,
    table: torch.Tensor | None,
    wanted: int,
    tile: int,
) -> None:
    """Write to `out` [B, heads * head_dim] the sequences that have several parts, all of them done.

    partial [heads, parts, head_dim], with lse [heads, parts] the base-2 logarithm of each one's sum of weights. table:
    of `cut`, for `wanted` parts, or None: one sequence in up to `wanted` parts.
    """
    heads, count, head_dim = partial.shape
    most, cut_up = triton.next_power_of_2(wanted), table is not None
    _merge[(heads, min(wanted, len(context_lens)))](
        partial, lse, out, context_lens, table, count, SPLITS=0 if cut_up else wanted, TILE=0 if cut_up else tile,
        CUT=cut_up, MOST=most, AT_ONCE=min(most, 8 if cut_up else 32), DIM=head_dim,
        LANES=triton.next_power_of_2(head_dim), HEADS=heads, num_warps=4, **options(out),
    )  # fmt: skip


@triton.jit(do_not_specialize=["splits"])
def _merge(
    partial_ptr, lse_ptr, out_ptr, context_ptr, parts_ptr, splits,
    SPLITS: tl.constexpr, TILE: tl.constexpr, CUT: tl.constexpr, MOST: tl.constexpr, AT_ONCE: tl.constexpr,
    DIM: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    if CUT:
        at = parts_ptr + tl.program_id(1) * _COLUMNS
        row, first, used = tl.load(at + 5), tl.load(at + 6), tl.load(at + 7)
    else:
        row, _, _, first, used = part_of(parts_ptr, context_ptr, tl.program_id(1), SPLITS, TILE, CUT)
    start_after_previous(OVERLAP)
    if used > 1:
        merge_parts(
            partial_ptr, lse_ptr, out_ptr, head * splits + first, row * HEADS + head, used, MOST, AT_ONCE, DIM, LANES
        )
