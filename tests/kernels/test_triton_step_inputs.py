from __future__ import annotations

import pytest
import torch

from tests.kernels.triton_cases import DEVICE

pytest.importorskip("triton")
from qwenfit.kernels.triton.step_inputs import StepBuffers, fill_step, fill_step_reference


def poisoned_buffers(size: int, max_blocks: int) -> StepBuffers:
    rows = [torch.full((size,), 777, device=DEVICE) for _ in range(4)]
    return StepBuffers(*rows, torch.full((size, max_blocks), 777, dtype=torch.int32, device=DEVICE))


@pytest.mark.parametrize(("batch", "size", "width"), [(1, 1, 16), (3, 4, 144), (4, 4, 1)])
def test_a_step_is_filled_and_padded(batch: int, size: int, width: int) -> None:
    """The first sequence's token is one that only the device knows."""
    ours, theirs = poisoned_buffers(size, 144), poisoned_buffers(size, 144)
    last = torch.tensor([50, 51, 52, 53, 54], device=DEVICE)
    numbers = torch.arange(4 * batch, device=DEVICE).view(4, batch) + 5
    numbers[0, 0] = -1 - 3
    tables = torch.arange(batch * width, dtype=torch.int32, device=DEVICE).view(batch, width)
    fill_step(ours, numbers, tables, last)
    fill_step_reference(theirs, numbers, tables, last)
    assert ours.input_ids[0] == 53
    for name in vars(ours):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
