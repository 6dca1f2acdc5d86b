"""What kernels that read or write the paged KV cache share."""

from __future__ import annotations

import triton
import triton.language as tl

from qwenfit.kernels import kv_quant

_CONSTANT = tl.constexpr(kv_quant.CONSTANT)


@triton.jit
def blocks_of(table_ptr, token, stop, BLOCK_SIZE: tl.constexpr):
    """The blocks that hold tokens of a sequence, of any shape; to be loaded a tile before the tile itself."""
    return tl.load(table_ptr + token // BLOCK_SIZE, mask=token < stop, other=0)


@triton.jit
def scale_of(affine):
    """Of a scale and a zero that were loaded as one int64."""
    return affine.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def zero_of(affine):
    return (affine >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def scale_for(low, high):
    """The scale of `quantize_kv` for vectors between `low` and `high`."""
    scale = (high - low) / 255
    return tl.where(scale > 0, scale, _CONSTANT)
