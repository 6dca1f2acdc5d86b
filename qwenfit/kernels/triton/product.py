"""One linear layer of a step with what stands around it: the fused kernel for few rows, else its parts."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch.nn.functional import linear

from qwenfit.kernels.choice import (
    HOPPER_ROWS,
    INT_LANES_ROWS,
    INT_MATMUL_ROWS,
    INT_MATVEC_ROWS,
    MATVEC_ROWS,
    TILES_ROWS,
)
from qwenfit.kernels.hopper.product import has_hopper_product, hopper_product
from qwenfit.kernels.triton import bf16_matvec, int_matvec
from qwenfit.kernels.triton.arrange import Arranged, arrange
from qwenfit.kernels.triton.bf16_tiles import bf16_tiles, has_bf16_tiles
from qwenfit.kernels.triton.dequantise import dequantised
from qwenfit.kernels.triton.fused_norm import add_norm
from qwenfit.kernels.triton.gate import silu_mul
from qwenfit.kernels.triton.int_lanes import has_int_lanes, int_lanes
from qwenfit.kernels.triton.int_matmul import has_int_matmul, int_matmul, prefers_integers
from qwenfit.kernels.triton.int_matvec import BlockedWeight
from qwenfit.kernels.wide import add_product, wide_product

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
    out: torch.Tensor | None = None,
    near_attention: bool = False,
) -> torch.Tensor:
    """What `bf16_matvec_reference` and `int_matvec_reference` say, for any number of rows.

    The result has the residual's dtype, else `dtype` (plain weights only), else the model's: that of `norm`, or of x.
    With a norm x may be float32. A residual may be overwritten, and be the result. near_attention: it is the kernel
    after this one, or before, where the vendor's product takes no longer than `hopper_product` does.
    """
    rows, model_dtype = x.shape[0], x.dtype if norm is None else norm.dtype
    wanted = residual.dtype if residual is not None else dtype or model_dtype
    if isinstance(weight, BlockedWeight):
        if rows <= INT_MATVEC_ROWS:
            y = x.new_empty(rows, weight.out_features // (2 if gated else 1), dtype=wanted)
            return int_matvec.int_matvec(x, weight, bias, residual, norm, eps, gated, y)
        if _has_lanes(weight, x):
            return int_lanes(arrange(x, weight, norm, eps, lanes=True), weight, bias, residual, gated, wanted, out)
        if _has_matmul(weight, x):
            arranged = _arranged(x, weight, norm, eps)
            if not gated:
                return int_matmul(arranged, weight, bias, residual, wanted)
            y = silu_mul(int_matmul(arranged, weight, bias, None, model_dtype))
            return y.to(wanted) if residual is None else residual.add_(y)
    elif rows <= MATVEC_ROWS and not _has_tiles(weight, rows, model_dtype):
        return bf16_matvec.bf16_matvec(x, weight, bias, residual, norm, eps, gated, wanted, out)
    if norm is not None:
        x, _ = add_norm(x, None, norm, eps)
    unpacked = isinstance(weight, BlockedWeight)
    if isinstance(weight, BlockedWeight):
        x = x if weight.perm is None else x.index_select(1, weight.perm)
        weight = dequantised(weight, x.dtype)
    elif _has_tiles(weight, rows, x.dtype):
        return bf16_tiles(x, weight, bias, residual, gated, wanted, out)
    known = residual is None or residual.dtype == torch.float32
    if known and not near_attention and takes_hopper(weight, rows, x.dtype):
        return hopper_product(x, weight, bias, residual, gated, wanted, out, early=not unpacked)
    if bias is None and not gated:
        if residual is not None:
            return add_product(residual, x, weight)
        if wanted != x.dtype:
            return wide_product(x, weight, out)
    y = linear(x, weight, bias)
    y = silu_mul(y) if gated else y
    return y.to(wanted) if residual is None else residual.add_(y)


def mlp(x: torch.Tensor, gate_up: Weight, down: Weight, norm: torch.Tensor, eps: float) -> torch.Tensor:
    """x + down(silu(gate) * up) of RMSNorm(x), [rows, width]; the halves of `gate_up` are gate and up.

    x may be overwritten.
    """
    lanes = _has_lanes(gate_up, x)  # which apply the gate themselves
    if len(x) > INT_MATVEC_ROWS and not lanes and _has_matmul(gate_up, x) and _has_matmul(down, x):
        both = int_matmul(_arranged(x, gate_up, norm, eps), gate_up, dtype=norm.dtype)
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


def _has_tiles(weight: Weight, rows: int, dtype: torch.dtype) -> TypeGuard[torch.Tensor]:
    """Whether `bf16_tiles` takes the weight and so many rows of `dtype`."""
    some = TILES_ROWS[0] <= rows <= TILES_ROWS[1]
    return some and isinstance(weight, torch.Tensor) and weight.dtype == dtype and has_bf16_tiles(weight)


def takes_hopper(weight: Weight, rows: int, dtype: torch.dtype) -> TypeGuard[torch.Tensor]:
    """Whether `hopper_product` multiplies so many rows of `dtype` by the weight, more than kernels of few rows take."""
    some = TILES_ROWS[1] < rows <= HOPPER_ROWS
    return some and isinstance(weight, torch.Tensor) and weight.dtype == dtype and has_hopper_product(weight)


def _has_lanes(weight: Weight, x: torch.Tensor) -> TypeGuard[BlockedWeight]:
    """Whether `int_lanes` takes the weight and so many rows."""
    few = INT_MATVEC_ROWS < len(x) <= INT_LANES_ROWS
    return few and isinstance(weight, BlockedWeight) and has_int_lanes(weight, x.device)


def _has_matmul(weight: Weight, x: torch.Tensor) -> TypeGuard[BlockedWeight]:
    """Whether `int_matmul` takes the weight and so many rows, those that `int_matvec` would be faster for apart."""
    return isinstance(weight, BlockedWeight) and len(x) <= INT_MATMUL_ROWS[weight.bits] and has_int_matmul(weight)
