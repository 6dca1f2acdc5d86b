"""One linear layer of a decoding step with what stands around it: the fused kernel for few rows, else its parts."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch.nn.functional import linear

from qwenfit.kernels.choice import INT_MATMUL_ROWS, INT_MATVEC_ROWS, MATVEC_ROWS
from qwenfit.kernels.triton import bf16_matvec, int_matvec
from qwenfit.kernels.triton.arrange import Arranged, arrange
from qwenfit.kernels.triton.dequantise import dequantised
from qwenfit.kernels.triton.fused_norm import add_norm
from qwenfit.kernels.triton.gate import silu_mul
from qwenfit.kernels.triton.int_matmul import has_int_matmul, int_matmul, prefers_integers
from qwenfit.kernels.triton.int_matvec import BlockedWeight

Weight = torch.Tensor | BlockedWeight


def product(
    x: torch.Tensor,
    weight: Weight,
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
        if rows <= INT_MATVEC_ROWS:
            return int_matvec.int_matvec(x, weight, bias, residual, norm, eps, gated)
        if _has_matmul(weight, x):
            y = int_matmul(_arranged(x, weight, norm, eps), weight, bias, residual, x.dtype)
            return silu_mul(y) if gated else y
    elif rows <= MATVEC_ROWS:
        return bf16_matvec.bf16_matvec(x, weight, bias, residual, norm, eps, gated, dtype)
    if norm is not None:
        x, _ = add_norm(x, None, norm, eps)
    y = many_rows(x, weight, bias) if residual is None else _added(x, weight, bias, residual)
    if gated:
        y = silu_mul(y)
    return y if dtype is None else y.to(dtype)


def mlp(x: torch.Tensor, gate_up: Weight, down: Weight, norm: torch.Tensor, eps: float) -> torch.Tensor:
    """x + down(silu(gate) * up) of RMSNorm(x), [rows, width]; the halves of `gate_up` are gate and up."""
    if len(x) > INT_MATVEC_ROWS and _has_matmul(gate_up, x) and _has_matmul(down, x):
        both = int_matmul(_arranged(x, gate_up, norm, eps), gate_up, dtype=x.dtype)
        return int_matmul(_arranged(both, down, gated=True), down, None, x, x.dtype)
    return product(product(x, gate_up, norm=norm, eps=eps, gated=True), down, residual=x)


def many_rows(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in] -> [rows, out]; by the tensor cores."""
    if not isinstance(weight, BlockedWeight):
        return linear(x, weight, bias)
    if _has_matmul(weight, x):
        return int_matmul(_arranged(x.contiguous(), weight), weight, bias, None, x.dtype)
    if weight.perm is not None:
        x = x.index_select(1, weight.perm)
    return linear(x, dequantised(weight, x.dtype), bias)


def _arranged(
    x: torch.Tensor, weight: BlockedWeight, norm: torch.Tensor | None = None, eps: float = 1e-6, gated: bool = False
) -> Arranged:
    return arrange(x, weight, norm, eps, gated, prefers_integers(weight, len(x)))


def _has_matmul(weight: Weight, x: torch.Tensor) -> TypeGuard[BlockedWeight]:
    """Whether `int_matmul` takes the weight and so many rows, those that `int_matvec` would be faster for apart."""
    return isinstance(weight, BlockedWeight) and x.shape[0] <= INT_MATMUL_ROWS and has_int_matmul(weight)


def _added(x: torch.Tensor, weight: Weight, bias: torch.Tensor | None, residual: torch.Tensor) -> torch.Tensor:
    if isinstance(weight, BlockedWeight) or bias is not None:
        return many_rows(x, weight, bias) + residual
    return torch.addmm(residual, x, weight.T)
