"""The C kernels of a block give what the PyTorch reference of each operation gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.kernels import block
from qwenfit.kernels.activation import silu_mul, silu_mul_reference
from qwenfit.kernels.attention import LayerCache, RaggedStep, paged_attention, paged_attention_reference, write_kv
from qwenfit.kernels.kv_quant import quantize_kv
from qwenfit.kernels.norm import rms_norm, rms_norm_reference
from qwenfit.kernels.rotary import rotate, rotate_reference

with torch.inference_mode():
    pytestmark = pytest.mark.skipif(not block.usable(torch.empty(1)), reason="needs a C compiler")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def inference() -> object:
    with torch.inference_mode():
        yield


def assert_close(actual: torch.Tensor, expected: torch.Tensor, steps: float = 2) -> None:
    """Equal up to `steps` units in the last place of the largest value."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    largest = float(expected.float().abs().max())
    assert float((actual.float() - expected.float()).abs().max()) <= steps * torch.finfo(actual.dtype).eps * largest


def randn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 896), (3, 7), (70, 1024)])
def test_rms_norm(rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight = randn(rows, width, dtype=dtype, scale=3), randn(width, dtype=dtype)
    steps = 4 if dtype == torch.float32 else 2  # each is two from the exact value, its sum in another order
    assert_close(rms_norm(x, weight, 1e-6), rms_norm_reference(x, weight, 1e-6), steps)
    assert torch.isnan(rms_norm(x.fill_(torch.nan), weight, 1e-6)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 4864), (3, 7), (70, 1024)])
def test_silu_mul(rows: int, width: int, dtype: torch.dtype) -> None:
    gate_up = randn(rows, 2 * width, dtype=dtype, scale=4)
    gate_up[0, :6] = torch.tensor([0.0, 200.0, -200.0, 3e30, -3e30, -88.0])
    assert_close(silu_mul(gate_up), silu_mul_reference(gate_up))
    gate_up = randn(rows, 2 * width, dtype=dtype, scale=4)
    assert_close(silu_mul(gate_up), silu_mul_reference(gate_up))
    assert torch.isnan(silu_mul(gate_up.fill_(torch.nan))).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 16, 64), (3, 1, 6), (40, 8, 128)])
def test_rotate(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    x = randn(tokens, heads + 2, head_dim, dtype=dtype)[:, :heads]  # the heads of v follow
    angle = torch.randn(tokens, 1, head_dim)
    assert_close(rotate(x, angle.cos(), angle.sin()), rotate_reference(x, angle.cos(), angle.sin()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_keys_are_those_of_the_reference(dtype: torch.dtype) -> None:
    k, v = randn(5, 3, 24, dtype=dtype), randn(5, 3, 24, dtype=dtype) + 7
    k[1] = 2.5  # a constant vector
    cache = LayerCache(*torch.zeros(2, 4, 4, 3, 24, dtype=torch.uint8), *torch.zeros(2, 4, 4, 3, 2))
    slots = torch.tensor([9, 2, 3, 15, 0])
    write_kv(cache, k, v, RaggedStep([5], [5], torch.zeros(1, 1, dtype=torch.int32), slots, 4, dtype))
    assert cache.key_affine is not None and cache.value_affine is not None
    for stored, affine, x in ((cache.key, cache.key_affine, k), (cache.value, cache.value_affine, v)):
        q, expected = quantize_kv(x)
        assert torch.equal(stored.flatten(0, 1)[slots], q)
        assert torch.allclose(affine.flatten(0, 1)[slots], expected, rtol=1e-6)
        assert int(stored.flatten(0, 1).count_nonzero()) == int(q.count_nonzero())  # and no other slot was touched


@settings(max_examples=60, deadline=None)
@given(
    lens=st.lists(st.integers(1, 70), min_size=1, max_size=5),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    head_dim=st.sampled_from([6, 16, 64, 128, 256]),
    dtype=st.sampled_from(DTYPES),
    stored=st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]),
    seed=st.integers(0, 2**32),
)
def test_decode_attention(
    lens: list[int], kv_heads: int, group: int, head_dim: int, dtype: torch.dtype, stored: torch.dtype, seed: int
) -> None:
    """Stale memory in the cache, NaN here, is never read."""
    torch.manual_seed(seed)
    size, width = 8, 9
    tables = torch.randperm(len(lens) * width).to(torch.int32).view(len(lens), width)
    key, value = torch.randn(2, tables.numel(), size, kv_heads, head_dim)
    for table, length in zip(tables, lens, strict=True):
        slots = torch.arange(length, width * size)
        key[table[slots // size].long(), slots % size] = torch.nan
        value[table[slots // size].long(), slots % size] = torch.nan
    cache = LayerCache(key.to(stored), value.to(stored))
    if stored == torch.uint8:
        (k, key_affine), (v, value_affine) = quantize_kv(key), quantize_kv(value)
        cache = LayerCache(k, v, key_affine, value_affine)
    step = RaggedStep([1] * len(lens), lens, tables, torch.zeros(len(lens), dtype=torch.int64), size, dtype)
    q = randn(len(lens), kv_heads * group, head_dim, dtype=dtype, scale=2)
    expected = paged_attention_reference(q, cache, step, head_dim**-0.5)
    assert_close(paged_attention(q, cache, step, head_dim**-0.5), expected, steps=2 if dtype == torch.bfloat16 else 16)


def test_a_head_too_wide_for_the_kernel_takes_the_other_way() -> None:
    cache = LayerCache(*torch.randn(2, 1, 16, 1, 320))
    step = RaggedStep([1], [9], torch.zeros(1, 1, dtype=torch.int32), torch.tensor([8]), 16, torch.float32)
    q = torch.randn(1, 2, 320)
    assert cache.native is None
    assert_close(paged_attention(q, cache, step, 0.1), paged_attention_reference(q, cache, step, 0.1), steps=16)
