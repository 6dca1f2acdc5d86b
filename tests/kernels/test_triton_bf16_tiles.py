from __future__ import annotations

import pytest
import torch

from tests.kernels.triton_cases import error, poisoned, random

pytest.importorskip("triton")
from qwenfit.kernels.triton.bf16_matvec import bf16_matvec_reference
from qwenfit.kernels.triton.bf16_tiles import bf16_tiles

SMALL = {"rows": 32, "columns": 32, "splits": 1, "warps": 1, "beside": 2}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"splits": 2}, {"splits": 4, "rows": 16}], ids=str)
@pytest.mark.parametrize(("rows", "out", "inputs"), [(9, 40, 200), (16, 64, 96), (33, 72, 136), (64, 20, 64)])
def test_some_rows_times_a_plain_weight(
    rows: int, out: int, inputs: int, changes: dict[str, int], dtype: torch.dtype
) -> None:
    x, weight = random(rows, inputs, dtype=dtype), random(out, inputs, dtype=dtype)
    bias, residual = random(out, dtype=dtype), random(rows, out, seed=1)
    config = SMALL | changes
    for _ in range(2):  # the counters of those that share a sum are as they were
        y = bf16_tiles(x, weight, bias, residual, out=poisoned(rows, out), config=config)
        assert error(y, bf16_matvec_reference(x.float(), weight, bias, residual)) < 1e-6
    plain = bf16_tiles(x, weight, out=poisoned(rows, out, dtype=dtype), config=config)
    assert error(plain, bf16_matvec_reference(x, weight)) < 6e-3


@pytest.mark.parametrize("outputs", [32, 45, 64])
def test_the_gate_is_part_of_the_product(outputs: int) -> None:
    x, weight, bias = (random(*s, dtype=torch.bfloat16) for s in ((11, 160), (2 * outputs, 160), (2 * outputs,)))
    for given in (None, bias):
        y = bf16_tiles(x, weight, given, None, True, torch.float32, poisoned(11, outputs), SMALL)
        assert error(y, bf16_matvec_reference(x.float(), weight, given, gated=True)) < 1e-6


def test_the_residual_may_be_overwritten() -> None:
    for splits in (1, 2):
        x, weight, residual = (random(*s, dtype=torch.bfloat16) for s in ((16, 64), (40, 64), (16, 40)))
        expected = bf16_matvec_reference(x, weight, residual=residual)
        bf16_tiles(x, weight, residual=residual, out=residual, config=SMALL | {"splits": splits})
        assert error(residual, expected) < 6e-3
