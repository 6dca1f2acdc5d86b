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


def test_it_is_used_only_for_the_layout_of_the_c_kernels():
    assert not rounding.usable(8, torch.bfloat16, torch.device("cuda"), 1024, 128)
    assert not rounding.usable(4, torch.bfloat16, CPU, 64, 128)  # a row is less than one group
    assert rounding.usable(4, torch.bfloat16, CPU, 1024, 128) == (not native.why_not())


@pytest.mark.parametrize("shape", [(3, 5), (1 << 20,), (1 << 20, 3)])
def test_memory_in_huge_pages_is_memory(shape):
    tensor = pages.empty(shape, torch.bfloat16)
    assert tensor.shape == shape and tensor.dtype == torch.bfloat16
    assert tensor.fill_(1.5).float().mean() == 1.5
