"""Products of some dozens of activation rows with a 16-bit weight, near the speed of reading the weight.

At such sizes the vendor's library leaves a quarter of the memory's time unused: its tiles do not share the weight out
evenly, or they are too few. Here all programs run at once, the input may be split, and the norm-free half of SwiGLU is
the epilogue.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.bf16_matvec import bf16_matvec_reference
from qwenfit.kernels.triton.int_matmul import sum_splits
from qwenfit.kernels.triton.launch import options, start_after_previous

Config = dict[str, int]
bf16_matmul_reference = bf16_matvec_reference


def bf16_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    *,
    config: Config,
) -> torch.Tensor:
    """`bf16_matmul_reference` without a norm, in one kernel, or two where the input is split; `out` may be `residual`.

    `config`: tiles of `m` rows of x, `rows` of the weight and `k` of the input, which is cut into `splits` parts whose
    float32 sums are added in order. The input must be a multiple of `k`; a gated product is not split.
    """
    rows, (out_features, in_features) = x.shape[0], weight.shape
    outputs = out_features // (2 if gated else 1)
    if out is None:
        out = torch.empty(rows, outputs, dtype=dtype or x.dtype, device=x.device)
    splits = 1 if gated else config.get("splits", 1)
    target, last_bias, last_residual = out, bias, residual
    if splits > 1:
        target = torch.empty(splits, rows, outputs, dtype=torch.float32, device=x.device)
        last_bias, last_residual = None, None
    part = triton.cdiv(in_features, splits * config["k"]) * config["k"]
    _bf16_matmul[(triton.cdiv(rows, config["m"]), triton.cdiv(out_features, config["rows"]), splits)](
        x, weight, last_bias, last_residual, target, rows, part,
        IN=in_features, OUT=out_features, HAS_BIAS=last_bias is not None, HAS_RESIDUAL=last_residual is not None,
        GATED=gated, TILE_M=config["m"], TILE_OUT=config["rows"], TILE_K=config["k"],
        num_warps=config["warps"], num_stages=config["stages"], **options(x),
    )  # fmt: skip
    return sum_splits(target, bias, residual, out) if splits > 1 else out


@triton.jit(do_not_specialize=["rows", "part"])
def _bf16_matmul(
    x_ptr, w_ptr, bias_ptr, residual_ptr, y_ptr, rows, part,
    IN: tl.constexpr, OUT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_OUT: tl.constexpr, TILE_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    lane = tl.program_id(1) * TILE_OUT + tl.arange(0, TILE_OUT)
    out = lane
    if GATED:  # a gate's row stands beside its partner
        out = lane // 2 + lane % 2 * (OUT // 2)
    row = tl.minimum(out, OUT - 1).to(tl.int64)  # rows beyond the end repeat the last one, and are not stored
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    k = tl.arange(0, TILE_K)
    here = (m < rows)[:, None]
    w_at = w_ptr + row[:, None] * IN + k[None, :]
    x_at = x_ptr + m[:, None].to(tl.int64) * IN + k[None, :]
    acc = tl.zeros([TILE_M, TILE_OUT], tl.float32)
    first = tl.program_id(2) * part
    for start in tl.range(first, tl.minimum(first + part, IN), TILE_K):
        w = tl.load(w_at + start, eviction_policy="evict_first")
        x = tl.load(x_at + start, mask=here, other=0.0)
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + row).to(tl.float32)[None, :]
    column, width = lane, OUT
    if GATED:
        gate, up = tl.split(acc.reshape([TILE_M, TILE_OUT // 2, 2]))
        acc = gate * tl.sigmoid(gate) * up
        column, width = tl.program_id(1) * (TILE_OUT // 2) + tl.arange(0, TILE_OUT // 2), OUT // 2
    place = (tl.program_id(2) * rows + m[:, None].to(tl.int64)) * width + column[None, :]
    real = here & (column < width)[None, :]
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + place, mask=real, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, acc.to(y_ptr.dtype.element_ty), mask=real)
