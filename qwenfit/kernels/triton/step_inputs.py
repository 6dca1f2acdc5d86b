"""From what the host knows of a decoding step to the buffers that a CUDA graph reads, in one kernel."""

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
    block_tables: torch.Tensor  # int32 [size, max_blocks]


def fill_step_reference(
    buffers: StepBuffers, numbers: torch.Tensor, block_tables: torch.Tensor, last: torch.Tensor
) -> None:
    """Write a step of `batch` <= size sequences; the rows after them become padding: slot -1, context 0.

    numbers int64 [4, batch]: token ids, positions, slots, context lengths. A token id `-1 - row` stands for last[row],
    int64 [rows]: a token that only the device knows. block_tables int32 [batch, up to max_blocks].
    """
    batch, width = block_tables.shape
    ids = numbers[0]
    buffers.input_ids[:batch] = ids.where(ids >= 0, last[(-1 - ids).clamp(min=0)])
    for buffer, row in zip((buffers.positions, buffers.slots, buffers.context_lens), numbers[1:], strict=True):
        buffer[:batch] = row
    buffers.slots[batch:] = -1
    buffers.context_lens[batch:] = 0
    buffers.block_tables[:batch, :width] = block_tables


def fill_step(buffers: StepBuffers, numbers: torch.Tensor, block_tables: torch.Tensor, last: torch.Tensor) -> None:
    """`fill_step_reference` in one kernel, for contiguous tensors."""
    batch, width = block_tables.shape
    _fill_step[(len(buffers.slots),)](
        numbers, block_tables, last, buffers.input_ids, buffers.positions, buffers.slots, buffers.context_lens,
        buffers.block_tables, batch, width, buffers.block_tables.stride(0), TILE=_TILE, **options(numbers),
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch", "width", "stride"])
def _fill_step(
    numbers_ptr, tables_ptr, last_ptr, ids_ptr, positions_ptr, slots_ptr, context_ptr, out_tables_ptr,
    batch, width, stride, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    row = tl.program_id(0)
    if row < batch:
        token = tl.load(numbers_ptr + row)
        kept = tl.load(last_ptr + tl.maximum(-1 - token, 0))
        tl.store(ids_ptr + row, tl.where(token < 0, kept, token))
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
