"""Residual addition and RMSNorm in one pass, for kernels that have no norm of their own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.launch import options, start_after_previous


def add_norm_reference(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm of x + residual, x + residual); x and residual [tokens, width], weight [width].

    The norm has the weight's dtype, the sum the residual's, which may be float32. The norm is rounded once:
    `kernels.norm.rms_norm` rounds before the weight too, as the originals do, which is half
    of the whole error of a layer in bfloat16.
    """
    total = x if residual is None else (x.float() + residual.float()).to(residual.dtype)
    wide = total.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * inverse * weight.float()).to(weight.dtype), total


def add_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_norm_reference` in one kernel, for contiguous tensors; with a residual, the sum replaces it in place."""
    tokens, width = x.shape
    out = torch.empty_like(x, dtype=weight.dtype)
    lanes = triton.next_power_of_2(width)
    _add_norm[(tokens,)](
        x, residual, weight, out, eps, WIDTH=width, LANES=lanes, HAS_RESIDUAL=residual is not None,
        num_warps=max(1, min(16, lanes // 512)), **options(x),
    )  # fmt: skip
    return out, x if residual is None else residual


@triton.jit
def _add_norm(
    x_ptr, residual_ptr, weight_ptr, out_ptr, eps,
    WIDTH: tl.constexpr, LANES: tl.constexpr, HAS_RESIDUAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, LANES)
    weight = tl.load(weight_ptr + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    start_after_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * WIDTH
    x = tl.load(x_ptr + row + i, mask=i < WIDTH, other=0.0)
    if HAS_RESIDUAL:
        x = x.to(tl.float32) + tl.load(residual_ptr + row + i, mask=i < WIDTH, other=0.0).to(tl.float32)
        x = x.to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row + i, x, mask=i < WIDTH)
    wide = x.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    tl.store(out_ptr + row + i, (wide * inverse * weight).to(out_ptr.dtype.element_ty), mask=i < WIDTH)
