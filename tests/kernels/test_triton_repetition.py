from __future__ import annotations

import struct

import pytest
import torch

from tests.kernels.triton_cases import DEVICE, error, random

pytest.importorskip("triton")
from qwenfit.kernels.triton.repetition import penalise_repetition, penalise_repetition_reference


@pytest.mark.parametrize("lengths", [[1], [7, 1024], [3, 1500, 2048, 1025]])
def test_each_token_is_penalised_once_by_its_own_penalty(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 90, (6, 2050), generator=generator).int().to(DEVICE)  # most are there many times
    penalties = [1.05, 1.3, 0.7, 2.0][: len(lengths)]
    bits = [struct.unpack("q", struct.pack("d", penalty))[0] for penalty in penalties]
    rows, held = [4, 0, 2, 1][: len(lengths)], [5, 3, 0, 1][: len(lengths)]
    given = torch.tensor([rows, held, lengths, bits], device=DEVICE)
    ours, theirs = random(5, 100), random(5, 100)
    penalise_repetition(ours, tokens, given, max(lengths))
    penalise_repetition_reference(theirs, tokens, given)
    assert error(ours, theirs) < 1e-6 and not torch.equal(ours, random(5, 100))
    untouched = [row for row in range(5) if row not in rows]
    assert torch.equal(ours[untouched], random(5, 100)[untouched])
