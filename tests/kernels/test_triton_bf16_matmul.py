from __future__ import annotations

import pytest
import torch

from tests.kernels.triton_cases import error, poisoned, random

pytest.importorskip("triton")
from qwenfit.kernels.triton.bf16_matmul import bf16_matmul, bf16_matmul_reference

CONFIG = {"m": 16, "rows": 32, "k": 32, "warps": 4, "stages": 2}


@pytest.mark.parametrize("changes", [{}, {"splits": 3}, {"m": 32, "rows": 16}], ids=str)
@pytest.mark.parametrize(("out", "inputs"), [(96, 64), (70, 192)])
def test_some_rows_times_a_weight(out: int, inputs: int, changes: dict[str, int]) -> None:
    config = {**CONFIG, **changes}
    x, weight, bias, residual = random(19, inputs), random(out, inputs), random(out), random(19, out)
    y = bf16_matmul(x, weight, bias, residual, False, torch.float32, poisoned(19, out), config=config)
    assert error(y, bf16_matmul_reference(x, weight, bias, residual)) < 1e-5
    plain = bf16_matmul(x, weight, out=poisoned(19, out), config=config)
    assert error(plain, bf16_matmul_reference(x, weight)) < 1e-5
    into = residual.clone()
    assert bf16_matmul(x, weight, None, into, out=into, config=config) is into
    assert error(into, bf16_matmul_reference(x, weight, None, residual)) < 1e-5


def test_the_gate_is_part_of_the_product() -> None:
    for width in (24, 40):
        x, weight = random(19, 64), random(2 * width, 64)
        y = bf16_matmul(x, weight, gated=True, out=poisoned(19, width), config={**CONFIG, "splits": 2})
        assert error(y, bf16_matmul_reference(x, weight, gated=True)) < 1e-5
