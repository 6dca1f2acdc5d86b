"""An int4 or int8 weight written out in 16 bits once, for the vendor's matrix product: that pays for many rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.int_matvec import ONE, BlockedWeight, code_as_float, code_unit, unpack_blocked
from qwenfit.kernels.triton.launch import options, start_after_previous
from qwenfit.kernels.triton.layout import scale_in, zero_in


def dequantised_reference(weight: BlockedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight [out, in] of `dtype`, its columns in stored order (before `perm`)."""
    stored = unpack_blocked(weight)
    stored.perm = None
    return stored.dequantize(dtype)


def dequantised(weight: BlockedWeight, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """`dequantised_reference` in one kernel; `out` [out, in] is contiguous."""
    if out is None:
        out = torch.empty(weight.out_features, weight.in_features, dtype=dtype, device=weight.codes.device)
    rows, words = 8, 128
    _dequantise[(triton.cdiv(weight.out_features, rows), triton.cdiv(weight.codes.shape[1], words))](
        weight.codes, weight.scales, out, weight.out_features, ONE,
        IN=weight.in_features, BITS=weight.bits, BLOCK=weight.block,
        GROUP_WORDS=weight.group_size * weight.bits // 32, GROUPS=weight.scales.shape[1],
        WORDS=weight.codes.shape[1], TILE_OUT=rows, TILE_WORDS=words,
        **options(out),
    )  # fmt: skip
    return out


@triton.jit
def _slope_and_offset(scale_ptr, group, mask, n: tl.constexpr, BITS: tl.constexpr):
    """a and b with scale * (q - zero) = a * (1 + q / 2^n) + b."""
    stored = tl.load(scale_ptr + group, mask=mask, other=0)
    scale = scale_in(stored)
    return scale * 2.0**n, -scale * (2.0**n + zero_in(stored, BITS))


@triton.jit
def _dequantise(
    w_ptr, scale_ptr, out_ptr, rows, one,
    IN: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP_WORDS: tl.constexpr, GROUPS: tl.constexpr,
    WORDS: tl.constexpr, TILE_OUT: tl.constexpr, TILE_WORDS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    BLOCK_WORDS: tl.constexpr = BLOCK * BITS // 32
    row = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)[:, None]
    at = tl.program_id(1) * TILE_WORDS + tl.arange(0, TILE_WORDS)[None, :]
    here = (row < rows) & (at < WORDS)
    words = tl.load(w_ptr + row * WORDS + at, mask=here, other=0)
    column = at // BLOCK_WORDS * BLOCK + at % BLOCK_WORDS
    group = row * GROUPS + at // GROUP_WORDS
    for j in tl.static_range(32 // BITS):
        a, b = _slope_and_offset(scale_ptr, group, here, code_unit(j, BITS), BITS)
        w = code_as_float(words, one, j, BITS) * a + b
        i = column + j * BLOCK_WORDS
        tl.store(out_ptr + row.to(tl.int64) * IN + i, w.to(out_ptr.dtype.element_ty), mask=here & (i < IN))
