from __future__ import annotations

import pytest
import torch

from tests.kernels.triton_cases import error, poisoned, random

pytest.importorskip("triton")
from qwenfit.kernels.triton.bf16_matvec import bf16_matvec, bf16_matvec_reference

SMALL = {"rows": 4, "columns": 64, "warps": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "out", "inputs"), [(1, 7, 64), (1, 5, 200), (3, 9, 96), (8, 4, 72)])
def test_a_few_rows_times_a_plain_weight(rows: int, out: int, inputs: int, dtype: torch.dtype) -> None:
    x, weight = random(rows, inputs, dtype=dtype), random(out, inputs, dtype=dtype)
    bias, residual = random(out, dtype=dtype), random(rows, out, dtype=dtype, seed=1)
    y = bf16_matvec(x, weight, bias, residual, out=poisoned(rows, out, dtype=dtype), config=SMALL)
    assert error(y, bf16_matvec_reference(x, weight, bias, residual)) < {4: 1e-6, 2: 6e-3}[dtype.itemsize]


def test_norm_and_gate_are_part_of_the_product() -> None:
    x, weight, norm = random(2, 160) * 3, random(10, 160), random(160) * 0.1 + 1
    y = bf16_matvec(x, weight, norm=norm, gated=True, out=poisoned(2, 5), config=SMALL)
    assert error(y, bf16_matvec_reference(x, weight, norm=norm, gated=True)) < 1e-6


def test_the_residual_may_be_overwritten() -> None:
    x, weight, residual = random(1, 64), random(9, 64), random(1, 9)
    expected = bf16_matvec_reference(x, weight, residual=residual)
    bf16_matvec(x, weight, residual=residual, out=residual, config=SMALL)
    assert error(residual, expected) < 1e-6
