from __future__ import annotations

import pytest
import torch

from tests.kernels.test_triton_int_matvec import quantized
from tests.kernels.triton_cases import DEVICE, error, poisoned, random

pytest.importorskip("triton")
from qwenfit.kernels.triton.fused_norm import add_norm, add_norm_reference
from qwenfit.kernels.triton.gate import silu_mul, silu_mul_reference
from qwenfit.kernels.triton.int_matmul import dequantised, dequantised_reference, int_matmul, int_matmul_reference
from qwenfit.kernels.triton.int_matvec import pack_blocked

SMALL = {"m": 16, "rows": 16, "words": 32, "warps": 1}
CASES = [
    (4, 9, 256, 128, "middle"),
    (8, 5, 200, 1024, "whole"),
    (4, 6, 96, 32, "fractions"),
    (8, 20, 192, 64, "middle"),
]


@pytest.mark.parametrize(("bits", "out", "inputs", "group", "zeros"), CASES)
def test_dequantised(bits: int, out: int, inputs: int, group: int, zeros: str) -> None:
    packed = pack_blocked(quantized(bits, out, inputs, group, zeros), torch.float32, DEVICE)
    assert packed is not None
    w = dequantised(packed, torch.float32, out=poisoned(out, inputs))
    assert error(w, dequantised_reference(packed, torch.float32)) < 1e-4


@pytest.mark.parametrize("changes", [{}, {"splits": 3, "words": 16}], ids=["whole", "split"])
@pytest.mark.parametrize(("bits", "out", "inputs", "group", "zeros"), CASES)
def test_many_rows_times_an_integer_weight(
    bits: int, out: int, inputs: int, group: int, zeros: str, changes: dict[str, int]
) -> None:
    packed = pack_blocked(quantized(bits, out, inputs, group, zeros), torch.float32, DEVICE)
    assert packed is not None
    x, bias = random(19, inputs), random(out)
    y = int_matmul(x, packed, bias, out=poisoned(19, out), config={**SMALL, **changes})
    assert error(y, int_matmul_reference(x, packed, bias)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_with_a_residual(dtype: torch.dtype) -> None:
    x, residual, weight = (random(*s, dtype=dtype) for s in ((3, 70), (3, 70), (70,)))
    expected, total = add_norm_reference(x, residual, weight, 1e-6)
    normed, kept = add_norm(x, residual, weight, 1e-6)
    assert error(normed, expected) < (1e-6 if dtype == torch.float32 else 1e-2)
    assert kept is residual and error(residual, total) < (1e-6 if dtype == torch.float32 else 6e-3)
    assert error(add_norm(x, None, weight, 1e-6)[0], add_norm_reference(x, None, weight, 1e-6)[0]) < 1e-2


def test_gate() -> None:
    gate_up = random(3, 2 * 1030)
    assert error(silu_mul(gate_up), silu_mul_reference(gate_up)) < 1e-6
