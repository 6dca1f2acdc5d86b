from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.test_triton_int_matvec import packed_for, quantized
from tests.kernels.triton_cases import error, poisoned, random

pytest.importorskip("triton")
from qwenfit.kernels.triton import tuning
from qwenfit.kernels.triton.arrange import LARGEST, arrange, arrange_reference
from qwenfit.kernels.triton.bf16_matvec import bf16_matvec_reference
from qwenfit.kernels.triton.dequantise import dequantised, dequantised_reference
from qwenfit.kernels.triton.fused_norm import add_norm, add_norm_reference
from qwenfit.kernels.triton.gate import silu_mul, silu_mul_reference
from qwenfit.kernels.triton.int_lanes import int_lanes
from qwenfit.kernels.triton.int_matmul import int_matmul, int_matmul_reference
from qwenfit.kernels.triton.int_matvec import BlockedWeight, int_matvec_reference
from qwenfit.kernels.triton.product import mlp, product

SMALL = {"m": 16, "rows": 16, "warps": 4}
CASES = [
    (4, 9, 256, 128, "middle"),
    (8, 5, 200, 1024, "whole"),
    (4, 6, 192, 64, "fractions"),
    (8, 20, 192, 64, "middle"),
    (4, 17, 700, 1024, "whole"),
    (8, 16, 96, 32, "fractions"),
    (4, 40, 640, 128, "whole"),
    (4, 24, 384, 128, "narrow"),
    (8, 12, 192, 64, "narrow"),
]


@pytest.fixture
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Few programs, which the interpreter runs one after the other."""
    rule = tuning._rule
    wide = {"int_matvec": {"rows": 32}, "bf16_matvec": {"rows": 8}}
    monkeypatch.setattr(tuning, "_rule", lambda kernel, shape: rule(kernel, shape) | wide.get(kernel, {}))
    tuning._lookup.cache_clear()
    yield
    tuning._lookup.cache_clear()


def packed_weight(bits: int, out: int, inputs: int, group: int, zeros: str, permuted: bool = False) -> BlockedWeight:
    made = quantized(bits, out, inputs, group, zeros)
    if permuted:
        made.perm = torch.randperm(inputs, generator=torch.Generator().manual_seed(1))
    return packed_for(zeros, made)


@pytest.mark.parametrize(("bits", "out", "inputs", "group", "zeros"), [*CASES, (4, 6, 96, 32, "fractions")])
def test_dequantised(bits: int, out: int, inputs: int, group: int, zeros: str) -> None:
    packed = packed_weight(bits, out, inputs, group, zeros)
    w = dequantised(packed, torch.float32, out=poisoned(out, inputs))
    assert error(w, dequantised_reference(packed, torch.float32)) < 1e-4


@pytest.mark.parametrize(("bits", "out", "inputs", "group", "zeros"), CASES)
@pytest.mark.parametrize("kind", ["plain", "normed", "gated", "permuted"])
def test_activations_in_stored_order(bits: int, out: int, inputs: int, group: int, zeros: str, kind: str) -> None:
    """Integers and units give the activations back, to a part in 2 * LARGEST of the largest in their block."""
    packed = packed_weight(bits, out, inputs, group, zeros, kind == "permuted")
    x = random(5, inputs * (2 if kind == "gated" else 1))
    norm = random(inputs) if kind == "normed" else None
    got, expected = (make(x, packed, norm, 1e-5, kind == "gated") for make in (arrange, arrange_reference))
    assert got.values.shape == expected.values.shape and got.integers and got.rows == 5
    assert error(got.units, expected.units) < 1e-3  # a sum of integers near 0 is what a rounding of each makes it
    values = [
        (made.values[0].float() * 256 + made.values[1]).view(5, -1, packed.block) * made.units[0].T[..., None]
        for made in (got, expected)
    ]
    assert error(*values) < 1e-4
    largest = values[1].abs().amax(-1)
    assert torch.allclose(largest, got.units[0].T * LARGEST, rtol=1e-4)
    got, expected = (make(x, packed, norm, 1e-5, kind == "gated", False) for make in (arrange, arrange_reference))
    assert not got.integers and error(got.values, expected.values) < 1e-6
    assert error(got.units, expected.units) < 1e-5


@pytest.mark.parametrize("integers", [True, False], ids=["integers", "floats"])
@pytest.mark.parametrize("changes", [{}, {"splits": 3}, {"rows": 32, "m": 32, "unroll": 2}], ids=str)
@pytest.mark.parametrize(("bits", "out", "inputs", "group", "zeros"), CASES)
def test_many_rows_times_an_integer_weight(
    bits: int, out: int, inputs: int, group: int, zeros: str, changes: dict[str, int], integers: bool
) -> None:
    packed = packed_weight(bits, out, inputs, group, zeros, permuted=True)
    x, bias, residual = random(19, inputs), random(out), random(19, out)
    config = {**SMALL, **changes}
    arranged = arrange(x, packed, integers=integers)
    y = int_matmul(arranged, packed, bias, residual, torch.float32, poisoned(19, out), config)
    assert error(y, int_matmul_reference(x, packed, bias, residual)) < 1e-4
    plain = int_matmul(arranged, packed, None, None, torch.float32, poisoned(19, out), config)
    assert error(plain, int_matmul_reference(x, packed)) < 1e-4


@pytest.mark.usefixtures("wide_tiles")
def test_a_product_of_any_number_of_rows() -> None:
    """Whatever path a number of rows takes; a block of 16 bytes a row has no path by bytes."""
    for group, rows in ((128, 3), (128, 7), (128, 70), (32, 7)):
        packed = packed_weight(4, 24, 256, group, "middle")
        x, norm, residual = random(rows, 256), random(256), random(rows, 24)
        expected = int_matvec_reference(x, packed, None, residual, norm)
        assert error(product(x, packed, None, residual.clone(), norm), expected) < 1e-4
        expected = int_matvec_reference(x, packed, None, None, norm, gated=True)
        assert error(product(x, packed, None, None, norm, gated=True), expected) < 1e-4


@pytest.mark.usefixtures("wide_tiles")
@pytest.mark.parametrize("rows", [2, 6])
def test_sums_and_logits_in_float32_are_never_rounded_to_less(rows: int) -> None:
    """Of a model in bfloat16: x with a norm, a residual, and logits may be float32."""
    weight, norm = random(24, 256, dtype=torch.bfloat16), random(256, dtype=torch.bfloat16)
    x, residual = random(rows, 256, dtype=torch.bfloat16), random(rows, 24)
    added = product(x, weight, None, residual.clone())
    assert added.dtype == torch.float32
    assert error(added, bf16_matvec_reference(x.float(), weight, None, residual)) < 1e-5
    hidden = random(rows, 256)
    assert product(hidden, weight, norm=norm).dtype == torch.bfloat16
    logits = product(hidden, weight, norm=norm, dtype=torch.float32, out=poisoned(rows, 24))
    assert logits.dtype == torch.float32
    assert error(logits, bf16_matvec_reference(hidden, weight, None, None, norm)) < (5e-3 if rows > 4 else 1e-5)
    packed, hidden, norm = packed_weight(4, 128, 128, 64, "middle"), random(rows, 128), norm[:128]
    down = product(random(rows, 128, dtype=torch.bfloat16), packed, None, random(rows, 128))
    assert down.dtype == torch.float32
    gate_up = packed_weight(4, 256, 128, 64, "middle")
    inner = int_matvec_reference(hidden, gate_up, None, None, norm.float(), gated=True)
    expected = int_matvec_reference(inner, packed, None, hidden)
    assert error(mlp(hidden.clone(), gate_up, packed, norm, 1e-6), expected) < 1e-2


@pytest.mark.usefixtures("wide_tiles")
@pytest.mark.parametrize("rows", [2, 6, 260])
def test_feed_forward(rows: int) -> None:
    gate_up = packed_weight(4, 192, 128, 64, "middle")
    down = packed_weight(8, 128, 96, 32, "whole", permuted=True)
    x, norm = random(rows, 128), random(128)
    inner = int_matvec_reference(x, gate_up, None, None, norm, gated=True)
    assert error(mlp(x.clone(), gate_up, down, norm, 1e-6), int_matvec_reference(inner, down, None, x)) < 1e-4


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


@pytest.mark.parametrize(
    ("out", "inputs", "group", "zeros", "rows", "gated", "config"),
    [
        (24, 512, 128, "middle", 8, False, {"tiles": 1, "warps": 1, "ahead": 2}),
        (20, 700, 1024, "whole", 3, False, {"tiles": 2, "warps": 1, "ahead": 1}),
        (36, 192, 64, "fractions", 5, True, {"tiles": 2, "warps": 2, "ahead": 2}),
        (70, 256, 64, "middle", 7, True, {"tiles": 4, "warps": 1, "ahead": 3}),
        (20, 512, 128, "narrow", 6, False, {"tiles": 2, "warps": 2, "ahead": 1}),
    ],
    ids=str,
)
def test_few_rows_a_lane_at_a_time(
    out: int, inputs: int, group: int, zeros: str, rows: int, gated: bool, config: dict[str, int]
) -> None:
    packed, outputs = packed_weight(4, out, inputs, group, zeros, permuted=True), out // 2 if gated else out
    x, norm, bias, residual = random(rows, inputs), random(inputs), random(out), random(rows, outputs)
    arranged = arrange(x, packed, norm, 1e-5, lanes=True)
    y = int_lanes(arranged, packed, bias, residual, gated, torch.float32, poisoned(rows, outputs), config)
    assert error(y, int_matvec_reference(x, packed, bias, residual, norm, 1e-5, gated)) < 1e-4
    plain = int_lanes(arranged, packed, None, None, gated, torch.float32, poisoned(rows, outputs), config)
    assert error(plain, int_matvec_reference(x, packed, None, None, norm, 1e-5, gated)) < 1e-4


@pytest.mark.parametrize("rows", [6, 40])
def test_a_gate_may_have_a_residual_and_another_type(rows: int) -> None:
    packed = packed_weight(8, 16, 64, 64, "middle")
    x, residual = random(rows, 64, dtype=torch.bfloat16), random(rows, 8)
    expected = int_matvec_reference(x.float(), packed, None, residual, gated=True)
    assert error(product(x, packed, None, residual.clone(), gated=True), expected) < 1e-2
    weight = random(16, 64, dtype=torch.bfloat16)
    wide = product(x, weight, gated=True, dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert error(wide, bf16_matvec_reference(x.float(), weight, gated=True)) < 2e-2


@pytest.mark.parametrize("zeros", ["fractions", "narrow"])
def test_many_rows_of_bfloat16(zeros: str) -> None:
    """Which are multiplied as floats."""
    packed = packed_weight(4, 24, 256, 128, zeros)
    x = random(70, 256, dtype=torch.bfloat16)
    assert error(product(x, packed, dtype=None), int_matvec_reference(x, packed)) < 6e-3
