"""Round-to-nearest: every weight ends within half a step of where it was."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.quantize.rtn import quantize_rtn


def steps(qw):
    """Each weight's scale, [out, in]."""
    return qw.scales.abs().repeat_interleave(qw.group_size, dim=1)[:, : qw.in_features]


@settings(max_examples=40, deadline=None)
@given(
    out_features=st.integers(1, 40),
    in_features=st.integers(1, 300),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, 128, -1]),
    seed=st.integers(0, 2**31),
)
def test_asymmetric_error_is_at_most_one_step_at_the_ends_and_half_within(
    out_features, in_features, bits, group_size, seed
):
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(seed))
    qw = quantize_rtn(weight, bits, group_size, sym=False)
    # Rounding the zero shifts the grid by up to half a step, which the outermost code cannot follow.
    assert ((qw.dequantize() - weight).abs() <= steps(qw) * 1.001).all()
    inside = (qw.q > 0) & (qw.q < 2**bits - 1)
    assert ((qw.dequantize() - weight).abs() <= steps(qw) * 0.501)[inside].all()


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_puts_the_largest_magnitude_on_the_first_code(bits):
    weight = torch.randn(16, 256)
    qw = quantize_rtn(weight, bits, 64)
    groups, restored = weight.view(16, 4, 64), qw.dequantize().view(16, 4, 64)
    at = groups.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(restored.gather(-1, at), groups.gather(-1, at))
    assert (qw.q.view(16, 4, 64).gather(-1, at) == 0).all()
    assert (qw.zeros == 2 ** (bits - 1)).all()


def test_what_was_on_the_grid_stays():
    codes = torch.randint(0, 16, (8, 128))
    codes[:, 0] = 0  # the extreme fixes the scale
    weight = (codes - 8).float() * 0.37
    torch.testing.assert_close(quantize_rtn(weight, 4).dequantize(), weight)


def test_zero_groups_stay_zero():
    for sym in (True, False):
        qw = quantize_rtn(torch.zeros(4, 64), 4, 32, sym)
        assert (qw.dequantize() == 0).all() and qw.scales.isfinite().all()


def test_bfloat16_weights_and_many_rows_are_quantised_alike():
    """The rows are handled in pieces: the result does not depend on where a piece ends."""
    weight = torch.randn(3, 1 << 23).bfloat16()
    whole = quantize_rtn(weight, 8, 128)
    alone = quantize_rtn(weight[2:], 8, 128)
    assert torch.equal(whole.q[2:], alone.q) and torch.equal(whole.scales[2:], alone.scales)


def test_only_4_and_8_bits():
    with pytest.raises(ValueError, match="bits"):
        quantize_rtn(torch.zeros(2, 2), 3)
