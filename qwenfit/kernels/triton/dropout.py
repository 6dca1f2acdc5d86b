"""Dropout whose mask is drawn again from its seed in the backward pass, instead of being kept.

Each program draws eight 16-bit numbers from one round of Philox (4 x 32 bits), so the probability is a multiple of
2^-16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenfit.kernels.triton.launch import FUSED_SUMS

_LANES = 512  # draws of a program, of eight elements each


def keep_scale(probability: float) -> tuple[int, float]:
    """(elements are dropped whose 16-bit number lies below this, what the others are multiplied by)."""
    threshold = round(probability * 65536)
    return threshold, 65536 / (65536 - threshold)


def dropout(x: Tensor, probability: float, seed: int, out: Tensor | None = None) -> Tensor:
    """Contiguous x with a share `probability` of its elements 0 and the others over (1 - probability)."""
    if out is None:
        out = torch.empty_like(x)
    threshold, scale = keep_scale(probability)
    n = x.numel()
    _dropout[(triton.cdiv(n, 8 * _LANES),)](x, out, n, seed, threshold, scale, LANES=_LANES, num_warps=2, **FUSED_SUMS)
    return out


def dropout_backward(x: Tensor, through: Tensor, grad: Tensor, probability: float, seed: int) -> None:
    """In place: `grad` += the gradient that `through` becomes on its way back through dropout(x); through = dropout(x).

    All contiguous and of one shape: x the input, `through` the gradient of the dropped x, `grad` what x gets otherwise.
    """
    threshold, scale = keep_scale(probability)
    n = x.numel()
    _backward[(triton.cdiv(n, 8 * _LANES),)](
        x, through, grad, n, seed, threshold, scale, LANES=_LANES, num_warps=2, **FUSED_SUMS
    )  # fmt: skip


@triton.jit
def _draw(a, b, c, d, j: tl.constexpr):
    """The j-th of the eight 16-bit numbers in four words."""
    if j < 2:
        word = a
    elif j < 4:
        word = b
    elif j < 6:
        word = c
    else:
        word = d
    return ((word.to(tl.uint32, bitcast=True) >> (16 * (j % 2))) & 0xFFFF).to(tl.int32)


@triton.jit(do_not_specialize=["n", "seed", "threshold"])
def _dropout(x_ptr, out_ptr, n, seed, threshold, scale, LANES: tl.constexpr):
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    a, b, c, d = tl.randint4x(seed, lane.to(tl.int32), n_rounds=7)
    first = tl.program_id(0).to(tl.int64) * 8 * LANES + tl.arange(0, LANES)
    for j in tl.static_range(8):
        at = first + j * LANES
        x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        x = tl.where(_draw(a, b, c, d, j) >= threshold, x * scale, 0.0)
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=at < n)


@triton.jit(do_not_specialize=["n", "seed", "threshold"])
def _backward(x_ptr, through_ptr, grad_ptr, n, seed, threshold, scale, LANES: tl.constexpr):
    lane = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)
    a, b, c, d = tl.randint4x(seed, lane.to(tl.int32), n_rounds=7)
    first = tl.program_id(0).to(tl.int64) * 8 * LANES + tl.arange(0, LANES)
    dtype = x_ptr.dtype.element_ty
    for j in tl.static_range(8):
        at = first + j * LANES
        factor = tl.where(_draw(a, b, c, d, j) >= threshold, scale, 0.0)
        grad = tl.load(grad_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        through = tl.load(through_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float32)
        tl.store(grad_ptr + at, (grad + through * factor).to(dtype), mask=at < n)
        tl.store(through_ptr + at, (x * factor).to(dtype), mask=at < n)
