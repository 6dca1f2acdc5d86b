"""Residual addition and RMSNorm with their gradients, for training: one kernel forward, one backward."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenfit.kernels.norm import rms_norm_reference
from qwenfit.kernels.triton.launch import FUSED_SUMS

_ROWS = 16  # rows of a program of the backward pass, which sums the weight's gradient over them


def add_norm_reference(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual); x and residual [tokens, width], weight [width]; differentiable."""
    total = x if residual is None else x + residual
    return rms_norm_reference(total, weight, eps), total


def add_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`add_norm_reference` for contiguous tensors.

    The gradients of both results meet in one kernel, so that the sum should be used where x would be.
    """
    both: tuple[Tensor, Tensor] = _AddNorm.apply(x, residual, weight, eps)
    return both


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        tokens, width = x.shape
        normed = torch.empty_like(x)
        total = x if residual is None else torch.empty_like(x)
        lanes = triton.next_power_of_2(width)
        _forward[(tokens,)](
            x, residual, weight, normed, total, eps, WIDTH=width, LANES=lanes, HAS_RESIDUAL=residual is not None,
            num_warps=_warps(lanes), **FUSED_SUMS,
        )  # fmt: skip
        ctx.save_for_backward(total, weight)
        ctx.eps, ctx.has_residual = eps, residual is not None
        return normed, total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        total, weight = ctx.saved_tensors
        grad_normed, grad_total = (g.contiguous() for g in grad_outputs)
        needs_weight = ctx.needs_input_grad[2]
        grad, partial = add_norm_backward(total, weight, grad_normed, grad_total, ctx.eps, needs_weight)
        grad_weight = None if partial is None else partial.sum(0).to(weight.dtype)
        return grad, grad if ctx.has_residual else None, grad_weight, None


def add_norm_backward(
    total: Tensor, weight: Tensor, grad_normed: Tensor, grad_total: Tensor, eps: float, needs_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """(gradient of the sum [tokens, width], float32 parts of the weight's gradient [parts, width] that sum to it)."""
    tokens, width = total.shape
    lanes, programs = triton.next_power_of_2(width), triton.cdiv(tokens, _ROWS)
    grad = torch.empty_like(total)
    partial = torch.empty(programs, width, dtype=torch.float32, device=total.device) if needs_weight else None
    _backward[(programs,)](
        total, weight, grad_normed, grad_total, grad, partial, total.numel(), eps, WIDTH=width, LANES=lanes, ROWS=_ROWS,
        NEEDS_WEIGHT=needs_weight, num_warps=_warps(lanes), **FUSED_SUMS,
    )  # fmt: skip
    return grad, partial


def _warps(lanes: int) -> int:
    return max(1, min(16, lanes // 512))


@triton.jit
def _forward(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, total_ptr, eps,
    WIDTH: tl.constexpr, LANES: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, LANES)
    at = tl.program_id(0).to(tl.int64) * WIDTH + i
    here = i < WIDTH
    x = tl.load(x_ptr + at, mask=here, other=0.0)
    if HAS_RESIDUAL:
        x = (x.to(tl.float32) + tl.load(residual_ptr + at, mask=here, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + at, x, mask=here)
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    weight = tl.load(weight_ptr + i, mask=here, other=0.0).to(tl.float32)
    normed = (wide * inverse).to(x.dtype).to(tl.float32) * weight
    tl.store(normed_ptr + at, normed.to(x.dtype), mask=here)


@triton.jit
def _backward(
    total_ptr, weight_ptr, grad_normed_ptr, grad_total_ptr, grad_ptr, partial_ptr, elements, eps,
    WIDTH: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, NEEDS_WEIGHT: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, LANES)
    inside = i < WIDTH
    weight = tl.load(weight_ptr + i, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for offset in range(ROWS):
        row = first + offset
        at = row * WIDTH + i
        here = inside & (at < elements)
        x = tl.load(total_ptr + at, mask=here, other=0.0).to(tl.float32)
        upper = tl.load(grad_normed_ptr + at, mask=here, other=0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + eps)
        x *= inverse
        if NEEDS_WEIGHT:
            sums += upper * x
        upper *= weight
        grad = inverse * (upper - x * (tl.sum(upper * x, axis=0) / WIDTH))
        grad += tl.load(grad_total_ptr + at, mask=here, other=0.0).to(tl.float32)
        tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=here)
    if NEEDS_WEIGHT:
        tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * WIDTH + i, sums, mask=inside)
