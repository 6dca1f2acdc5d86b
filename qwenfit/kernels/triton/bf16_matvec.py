"""Products of a few activation rows with a bfloat16 or float16 weight, with norm, bias, gate and residual in them.

`bf16_matvec_reference` is the definition. As in int_matvec.py, a program owns some rows of the weight, reads its first
piece of them before the previous kernel has ended, and no sum is split.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.int_matvec import finish, finish_tile, normalised, row_of_tile, tile_operands
from qwenfit.kernels.triton.launch import options, start_after_previous
from qwenfit.kernels.triton.tuning import tuned

MAX_ROWS = 8


def bf16_matvec_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    gated: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """x [rows, in] @ weight [out, in].T -> [rows, out], or [rows, out / 2] when gated, of `dtype` (default: x's).

    float32 throughout, rounded once. `norm` [in] applies RMSNorm to x first, `gated` returns silu(first half of the
    outputs) * second half, `residual` [rows, outputs] is added last.
    """
    product = normalised(x, norm, eps) @ weight.float().T
    return finish(product, bias, residual, gated, dtype or x.dtype)


def bf16_matvec(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    gated: bool = False,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """`bf16_matvec_reference` in one kernel, for at most MAX_ROWS contiguous rows. `out` may be `residual`."""
    rows, (out_features, in_features) = x.shape[0], weight.shape
    outputs = out_features // (2 if gated else 1)
    if out is None:
        out = torch.empty(rows, outputs, dtype=dtype or x.dtype, device=x.device)
    config = config or tuned("bf16_matvec", (in_features, out_features, rows))
    tile = config["rows"]
    _bf16_matvec[(triton.cdiv(out_features, tile),)](
        x, weight, bias, residual, norm, out, rows, eps, outputs,
        IN=in_features, OUT=out_features, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        HAS_NORM=norm is not None, GATED=gated, M=1 << (rows - 1).bit_length(), TILE_OUT=tile,
        TILE_IN=min(config["columns"], triton.next_power_of_2(in_features)), num_warps=config["warps"], **options(x),
    )  # fmt: skip
    return out


@triton.jit
def sum_eights(x):
    """[8 n, ...] -> [n, ...]: the sum over the eight inputs that a thread holds."""
    return tl.sum(x.reshape([x.shape[0] // 8, 8, x.shape[1], x.shape[2]]), axis=1)


@triton.jit
def _bf16_matvec(
    x_ptr, w_ptr, bias_ptr, residual_ptr, norm_ptr, y_ptr, rows, eps, outputs,
    IN: tl.constexpr, OUT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr,
    GATED: tl.constexpr, M: tl.constexpr, TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # Tensors are [inputs, rows of the weight, rows of x].
    tile = tl.program_id(0)
    row, here = row_of_tile(tile, OUT, TILE_OUT, GATED)
    row, here = row[None, :, None], here[None, :, None]
    column = tl.arange(0, TILE_IN)[:, None, None]
    batch = tl.arange(0, M)[None, None, :]
    w_at = w_ptr + row.to(tl.int64) * IN + column
    w = tl.load(w_at, mask=here & (column < IN), other=0.0, eviction_policy="evict_first")
    start_after_previous(OVERLAP)
    bias, residual = tile_operands(
        tile, bias_ptr, residual_ptr, rows, outputs, OUT, TILE_OUT, M, HAS_BIAS, HAS_RESIDUAL, GATED
    )
    total = tl.zeros([TILE_IN // 8, TILE_OUT, M], tl.float32)
    squares = tl.zeros([TILE_IN // 8, 1, M], tl.float32)
    for start in range(0, IN, TILE_IN):
        following = tl.load(w_at + (start + TILE_IN), mask=here & (start + TILE_IN + column < IN), other=0.0,
                            eviction_policy="evict_first")  # fmt: skip
        i = start + column
        x = tl.load(x_ptr + batch * IN + i, mask=(i < IN) & (batch < rows), other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += sum_eights(x * x)
            x *= tl.load(norm_ptr + i, mask=i < IN, other=0.0).to(tl.float32)
        total += sum_eights(x * w.to(tl.float32))
        w = following
    y = tl.sum(total, axis=0)  # [TILE_OUT, M]
    if HAS_NORM:
        y *= tl.rsqrt(tl.sum(squares, axis=0) / IN + eps)
    finish_tile(y, tile, bias, residual, y_ptr, rows, outputs, TILE_OUT, M, HAS_BIAS, HAS_RESIDUAL, GATED)
