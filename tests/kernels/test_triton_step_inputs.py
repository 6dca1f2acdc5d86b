from __future__ import annotations

import pytest
import torch

from tests.kernels.triton_cases import DEVICE

pytest.importorskip("triton")
from qwenfit.kernels.triton.step_inputs import (
    StepBuffers,
    advance,
    advance_reference,
    extend,
    extend_reference,
    fill_step,
    fill_step_reference,
)


def poisoned_buffers(size: int, max_blocks: int) -> StepBuffers:
    rows = [torch.full((size,), 777, device=DEVICE) for _ in range(5)]
    return StepBuffers(*rows, torch.full((size, max_blocks), 777, dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize(("batch", "size", "width"), [(1, 1, 16), (3, 4, 144), (4, 4, 1)])
def test_a_step_is_filled_and_padded(batch: int, size: int, width: int) -> None:
    """The first sequence's token is one that only the device knows."""
    ours, theirs = poisoned_buffers(size, 144), poisoned_buffers(size, 144)
    last = torch.tensor([50, 51, 52, 53, 54], device=DEVICE)
    numbers = torch.arange(5 * batch, device=DEVICE).view(5, batch) + 5
    numbers[0, 0] = -1
    numbers[4] = torch.tensor([3, 0, 4, 1])[:batch]
    tables = torch.arange(batch * width, dtype=torch.int32, device=DEVICE).view(batch, width)
    fill_step(ours, numbers, tables, last)
    fill_step_reference(theirs, numbers, tables, last)
    assert ours.input_ids[0] == 53
    for name in vars(ours):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def a_step(tables: list[list[int]], contexts: list[int]) -> StepBuffers:
    """Of sequences with such contexts; their tokens are kept in the rows 4, 3, 2, ..."""
    buffers = StepBuffers.padding(len(tables), len(tables[0]), torch.device(DEVICE))
    buffers.block_tables.copy_(torch.tensor(tables))
    buffers.context_lens.copy_(torch.tensor(contexts))
    buffers.positions.copy_(torch.tensor([max(context - 1, 0) for context in contexts]))
    buffers.rows.copy_(4 - torch.arange(len(tables)))
    return buffers


@pytest.mark.parametrize(
    ("tables", "contexts"),
    [([[0, 9], [4, 2], [7, 7]], [4, 7, 0]), ([[3, 1, 5]], [12]), ([[3, 1, 5], [6, 0, 2]], [0, 11]), ([[8]], [1])],
)
def test_the_next_step_follows_the_block_table(tables: list[list[int]], contexts: list[int]) -> None:
    """Over the end of a block, beside padding, and past the table, where there is no slot."""
    ours, theirs = a_step(tables, contexts), a_step(tables, contexts)
    last = [torch.full((5,), 777, device=DEVICE) for _ in range(2)]
    tokens = torch.tensor([5, -1, 7], device=DEVICE)[: len(tables)]
    advance(ours, tokens, last[0], 4)
    advance_reference(theirs, tokens, last[1], 4)
    assert torch.equal(*last)
    for name in vars(ours):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_what_the_next_step_is_made_of() -> None:
    buffers, last = a_step([[0, 9], [4, 2], [7, 7], [1, 3]], [4, 7, 0, 8]), torch.full((5,), 777, device=DEVICE)
    advance(buffers, torch.tensor([5, -1, 6, 8], device=DEVICE), last, 4)
    assert buffers.input_ids.tolist() == [5, 0, 0, 8] and buffers.positions.tolist() == [4, 7, 0, 8]
    assert buffers.slots.tolist() == [9 * 4, 2 * 4 + 3, -1, -1] and buffers.context_lens.tolist() == [5, 8, 0, 9]
    assert last.tolist() == [777, 8, 777, 0, 5]


def test_blocks_that_the_next_step_begins() -> None:
    """A step whose second and fourth sequences are at the end of a block that the table has nothing after."""
    ours, theirs = (a_step([[3, 0], [4, 0], [7, 7], [1, 0]], [3, 4, 7, 4]) for _ in range(2))
    new = torch.tensor([[3, 1], [1, 1], [6, 2**31 - 1]], device=DEVICE)
    extend(ours, new, 4)
    extend_reference(theirs, new, 4)
    assert ours.block_tables.tolist() == [[3, 0], [4, 2**31 - 1], [7, 7], [1, 6]]
    assert ours.slots.tolist() == [-1, (2**31 - 1) * 4, -1, 24]
    for name in vars(ours):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
