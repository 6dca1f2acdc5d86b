"""round.c: the numbers of `quantize_rtn` and `pack`, bit for bit, in one pass over the rows."""

import pytest
import torch

from qwenfit.kernels import native, pages, rounding
from qwenfit.kernels.packed import pack
from qwenfit.quantize.rtn import quantize_rtn

CPU = torch.device("cpu")


@pytest.mark.skipif(bool(native.why_not()), reason="no C compiler")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 256), (50, 896), (33, 300), (16, 128)])
def test_it_is_the_reference_bit_for_bit(bits, dtype, shape):
    """Also rows and inputs that do not fill their block and group, zeros, ties, and a row that is all alike."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(bits)).to(dtype)
    weight[0, :9], weight[1], weight[2] = 0, 0, 0.25
    weight[3] = torch.arange(shape[1]) % 17 - 8  # halves between codes
    expected = pack(quantize_rtn(weight, bits, 128), torch.bfloat16)
    got = rounding.empty(bits, *shape, 128)
    for start in range(0, shape[0], 32):
        rounding.round_rows(weight[start : start + 32].contiguous(), got, start)
    assert expected.layout == "interleaved" and expected.zeros is None
    assert torch.equal(got.codes, expected.codes) and torch.equal(got.scales, expected.scales)
    assert (got.group_size, got.out_features, got.in_features) == (128, *shape)


@pytest.mark.skipif(bool(native.why_not()), reason="no C compiler")
@pytest.mark.parametrize("bits", [4, 8])
def test_nothing_rounds_otherwise_at_the_edges(bits):
    """Quotients at and beside the middle of two codes, where a product with 1 / scale would fall on the other side;
    groups of the smallest, of the largest and of no numbers."""
    half, generator = 2 ** (bits - 1), torch.Generator().manual_seed(bits)
    scales = torch.rand(2000, 1, generator=generator) + 0.5
    codes = torch.randint(-half, half, (2000, 128), generator=generator) + 0.5
    weight = scales * codes.clamp(max=half - 1)
    weight[:, 0] = -half * scales[:, 0]
    bits_of = weight.view(torch.int32)
    bits_of += torch.randint(-2, 3, bits_of.shape, generator=generator, dtype=torch.int32)
    for row, factor in enumerate((1e-45, 1e-40, 1e-37, 1e-30, 1e30, 1e36)):
        weight[row] *= factor
    weight[6, 5], weight[7, 6], weight[8, 7] = torch.inf, -torch.inf, torch.nan
    weight[9] = 3e38
    got = rounding.empty(bits, 2000, 128, 128)
    rounding.round_rows(weight, got, 0)
    expected = pack(quantize_rtn(weight, bits, 128), torch.bfloat16)
    assert torch.equal(got.scales.nan_to_num(7.0), expected.scales.nan_to_num(7.0))
    rows = got.codes.movedim(1, 2).flatten(0, 1), expected.codes.movedim(1, 2).flatten(0, 1)
    finite = torch.ones(2000, dtype=torch.bool)
    finite[6:9] = False  # their codes mean nothing
    assert torch.equal(rows[0][:2000][finite], rows[1][:2000][finite])


def test_it_is_used_only_for_the_layout_of_the_c_kernels():
    assert not rounding.usable(8, torch.bfloat16, torch.device("cuda"), 1024, 128)
    assert not rounding.usable(4, torch.bfloat16, CPU, 64, 128)  # a row is less than one group
    assert rounding.usable(4, torch.bfloat16, CPU, 1024, 128) == (not native.why_not())


@pytest.mark.parametrize("shape", [(3, 5), (1 << 20,), (1 << 20, 3)])
def test_memory_in_huge_pages_is_memory(shape):
    tensor = pages.empty(shape, torch.bfloat16)
    assert tensor.shape == shape and tensor.dtype == torch.bfloat16
    assert tensor.fill_(1.5).float().mean() == 1.5
