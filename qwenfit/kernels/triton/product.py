"""One linear layer of a decoding step with what stands around it: the fused kernel for few rows, else its parts."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from qwenfit.kernels.choice import MATVEC_ROWS
from qwenfit.kernels.triton import bf16_matvec, int_matvec
from qwenfit.kernels.triton.fused_norm import add_norm
from qwenfit.kernels.triton.gate import silu_mul
from qwenfit.kernels.triton.int_matmul import dequantised, int_matmul
from qwenfit.kernels.triton.int_matvec import BlockedWeight

MATMUL_ROWS = 64  # from here on unpacking a weight for the vendor's product costs less than it saves


def product(
    x: torch.Tensor,
    weight: torch.Tensor | BlockedWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    gated: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """What `bf16_matvec_reference` and `int_matvec_reference` say, for any number of rows; `dtype` of plain weights."""
    rows = x.shape[0]
    if isinstance(weight, BlockedWeight):
        if rows <= MATVEC_ROWS:
            return int_matvec.int_matvec(x, weight, bias, residual, norm, eps, gated)
    elif rows <= MATVEC_ROWS:
        return bf16_matvec.bf16_matvec(x, weight, bias, residual, norm, eps, gated, dtype)
    if norm is not None:
        x, _ = add_norm(x, None, norm, eps)
    y = many_rows(x, weight, bias) if residual is None else _added(x, weight, bias, residual)
    if gated:
        y = silu_mul(y)
    return y if dtype is None else y.to(dtype)


def many_rows(x: torch.Tensor, weight: torch.Tensor | BlockedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in] -> [rows, out]; by the tensor cores."""
    if not isinstance(weight, BlockedWeight):
        return linear(x, weight, bias)
    if weight.perm is not None:
        x = x.index_select(1, weight.perm)
    if x.shape[0] <= MATMUL_ROWS:
        return int_matmul(x.contiguous(), weight, bias)
    return linear(x, dequantised(weight, x.dtype), bias)


def _added(
    x: torch.Tensor, weight: torch.Tensor | BlockedWeight, bias: torch.Tensor | None, residual: torch.Tensor
) -> torch.Tensor:
    if isinstance(weight, BlockedWeight) or bias is not None:
        return many_rows(x, weight, bias) + residual
    return torch.addmm(residual, x, weight.T)
