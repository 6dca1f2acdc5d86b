"""The buffers that the CUDA graph of a decoding step reads: filled by the host, or moved on by the graph itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.launch import options, start_after_previous

_TILE = 128


@dataclass(frozen=True)
class StepBuffers:
    """What a recorded step of `size` sequences reads."""

    input_ids: torch.Tensor  # int64 [size]
    positions: torch.Tensor
    slots: torch.Tensor
    context_lens: torch.Tensor
    rows: torch.Tensor  # where `last` has the newest token of each sequence
    block_tables: torch.Tensor  # int32 [size, max_blocks]

    @classmethod
    def padding(cls, size: int, max_blocks: int, device: torch.device) -> StepBuffers:
        """A step without any sequence: slots -1, contexts 0."""
        ids, positions, contexts, rows = (torch.zeros(size, dtype=torch.int64, device=device) for _ in range(4))
        slots = torch.full((size,), -1, dtype=torch.int64, device=device)
        tables = torch.zeros(size, max_blocks, dtype=torch.int32, device=device)
        return cls(ids, positions, slots, contexts, rows, tables)


def fill_step_reference(
    buffers: StepBuffers, numbers: torch.Tensor, block_tables: torch.Tensor, last: torch.Tensor
) -> None:
    """Write a step of `batch` <= size sequences; the rows after them become padding: slot -1, context 0.

    numbers int64 [5, batch]: token ids, positions, slots, context lengths, rows. A negative token id stands for
    last[row], int64 [rows]: a token that only the device knows. block_tables int32 [batch, up to max_blocks].
    """
    batch, width = block_tables.shape
    ids, *others, rows = numbers
    buffers.input_ids[:batch] = ids.where(ids >= 0, last[rows])
    kept = buffers.positions, buffers.slots, buffers.context_lens, buffers.rows
    for buffer, values in zip(kept, (*others, rows), strict=True):
        buffer[:batch] = values
    buffers.slots[batch:] = -1
    buffers.context_lens[batch:] = 0
    buffers.block_tables[:batch, :width] = block_tables


def fill_step(buffers: StepBuffers, numbers: torch.Tensor, block_tables: torch.Tensor, last: torch.Tensor) -> None:
    """`fill_step_reference` in one kernel, for contiguous tensors."""
    batch, width = block_tables.shape
    _fill_step[(len(buffers.slots),)](
        numbers, block_tables, last, buffers.input_ids, buffers.positions, buffers.slots, buffers.context_lens,
        buffers.rows, buffers.block_tables, batch, width, buffers.block_tables.stride(0),
        TILE=_TILE, **options(numbers),
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "width", "stride"])
def _fill_step(
    numbers_ptr, tables_ptr, last_ptr, ids_ptr, positions_ptr, slots_ptr, context_ptr, rows_ptr, out_tables_ptr,
    batch, width, stride, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    row = tl.program_id(0)
    if row < batch:
        token = tl.load(numbers_ptr + row)
        at = tl.load(numbers_ptr + 4 * batch + row)
        tl.store(rows_ptr + row, at)
        tl.store(ids_ptr + row, tl.where(token < 0, tl.load(last_ptr + at), token))
        tl.store(positions_ptr + row, tl.load(numbers_ptr + batch + row))
        tl.store(slots_ptr + row, tl.load(numbers_ptr + 2 * batch + row))
        tl.store(context_ptr + row, tl.load(numbers_ptr + 3 * batch + row))
        for start in range(0, width, TILE):
            i = start + tl.arange(0, TILE)
            blocks = tl.load(tables_ptr + row * width + i, mask=i < width, other=0)
            tl.store(out_tables_ptr + row * stride + i, blocks, mask=i < width)
    else:
        tl.store(slots_ptr + row, tl.full([], -1, tl.int64))
        tl.store(context_ptr + row, tl.full([], 0, tl.int64))


def extend_reference(buffers: StepBuffers, new: torch.Tensor, block_size: int) -> None:
    """Give sequences of the next step the block that it begins: new int64 [3, n], sequences, columns and blocks.

    `advance` could not know them. A sequence comes once.
    """
    sequences, columns, blocks = new
    buffers.block_tables[sequences, columns] = blocks.int()
    buffers.slots[sequences] = blocks * block_size


def extend(buffers: StepBuffers, new: torch.Tensor, block_size: int) -> None:
    """`extend_reference` in one kernel, for a contiguous `new`."""
    count = new.shape[1]
    _extend[(count,)](
        new, buffers.block_tables, buffers.slots, count, buffers.block_tables.stride(0),
        BLOCK_SIZE=block_size, num_warps=1, **options(new),
    )  # fmt: skip


@triton.jit(do_not_specialize=["count", "stride"])
def _extend(new_ptr, tables_ptr, slots_ptr, count, stride, BLOCK_SIZE: tl.constexpr, OVERLAP: tl.constexpr):
    start_after_previous(OVERLAP)
    sequence = tl.load(new_ptr + tl.program_id(0))
    column = tl.load(new_ptr + count + tl.program_id(0))
    block = tl.load(new_ptr + 2 * count + tl.program_id(0))
    tl.store(tables_ptr + sequence * stride + column, block.to(tl.int32))
    tl.store(slots_ptr + sequence, block * BLOCK_SIZE)


def advance_reference(buffers: StepBuffers, tokens: torch.Tensor, last: torch.Tensor, block_size: int) -> None:
    """Make the next step of sequences that each got one of `tokens`, int64 [size]; -1 counts as 0.

    Each token also goes to last[row], int64 [rows]. Padding stays as it is and touches nothing of `last`. The block of
    the next token must be in the table already: where it is not, the step is not to be run before its slot is filled.
    """
    real = buffers.context_lens > 0
    context, rows = buffers.context_lens[real], buffers.rows[real]
    column = context // block_size
    table = buffers.block_tables[real]
    inside = column < table.shape[1]
    block = table.gather(1, column.where(inside, 0)[:, None])[:, 0].long()
    last[rows] = buffers.input_ids[real] = tokens[real].clamp(min=0)
    buffers.positions[real] = context
    buffers.slots[real] = torch.where(inside, block * block_size + context % block_size, -1)
    buffers.context_lens[real] = context + 1


def advance(buffers: StepBuffers, tokens: torch.Tensor, last: torch.Tensor, block_size: int) -> None:
    """`advance_reference` in one kernel."""
    _advance[(len(tokens),)](
        tokens, last, buffers.input_ids, buffers.positions, buffers.slots, buffers.context_lens, buffers.rows,
        buffers.block_tables, buffers.block_tables.shape[1], buffers.block_tables.stride(0),
        BLOCK_SIZE=block_size, num_warps=1, **options(tokens),
    )  # fmt: skip


@triton.jit
def _advance(
    tokens_ptr, last_ptr, ids_ptr, positions_ptr, slots_ptr, context_ptr, rows_ptr, table_ptr, width, table_stride,
    BLOCK_SIZE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    row = tl.program_id(0)
    context = tl.load(context_ptr + row)
    if context > 0:
        token = tl.maximum(tl.load(tokens_ptr + row), 0)
        tl.store(last_ptr + tl.load(rows_ptr + row), token)
        tl.store(ids_ptr + row, token)
        tl.store(positions_ptr + row, context)
        column = context // BLOCK_SIZE  # the table's width after the last token of the longest context
        block = tl.load(table_ptr + row * table_stride + column, mask=column < width, other=0).to(tl.int64)
        tl.store(slots_ptr + row, tl.where(column < width, block * BLOCK_SIZE + context % BLOCK_SIZE, -1))
        tl.store(context_ptr + row, context + 1)
