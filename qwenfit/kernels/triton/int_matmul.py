"""Products of many activation rows with an int4 or int8 weight, on the tensor cores.

`int_matmul` unpacks codes in registers and never stores the weight; `dequantised` writes it once to 16 bits for the
vendor's matrix product, which pays from some hundred rows on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.int_matvec import ONE, BlockedWeight, code_as_float, code_unit, finish, unpack_blocked
from qwenfit.kernels.triton.launch import options, start_after_previous
from qwenfit.kernels.triton.tuning import tuned

_SUM_TILE = 1024


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
        weight.codes, weight.scales, weight.zeros, out, weight.out_features, ONE,
        TILE_OUT=rows, TILE_WORDS=words, **_layout(weight), **options(out),
    )  # fmt: skip
    return out


def int_matmul_reference(x: torch.Tensor, weight: BlockedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [rows, in] (already in the order of `perm`) times the weight, rounded to x's dtype, + bias."""
    product = x.float() @ dequantised_reference(weight, x.dtype).float().T
    return finish(product, bias, None, False, x.dtype)


def int_matmul(
    x: torch.Tensor,
    weight: BlockedWeight,
    bias: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """`int_matmul_reference` in one kernel, or two where the input is split. Weights are rounded to x's dtype.

    `config`: tiles of `m` rows of x and `rows` rows of the weight, `words` words at a time; the input is cut into
    `splits` parts, whose float32 sums are added in order.
    """
    rows = x.shape[0]
    if out is None:
        out = torch.empty(rows, weight.out_features, dtype=x.dtype, device=x.device)
    config = config or tuned("int_matmul", (weight.bits, weight.in_features, weight.out_features, rows))
    tile_m, tile_out, splits = config["m"], config["rows"], config.get("splits", 1)
    parts, part_bias = out, bias
    if splits > 1:
        parts = torch.empty(splits, rows, weight.out_features, dtype=torch.float32, device=x.device)
        part_bias = None
    _int_matmul[(triton.cdiv(weight.out_features, tile_out), triton.cdiv(rows, tile_m), splits)](
        x, weight.codes, weight.scales, weight.zeros, part_bias, parts, rows, ONE,
        OUT=weight.out_features, HAS_BIAS=part_bias is not None, TILE_M=tile_m, TILE_OUT=tile_out,
        TILE_WORDS=config["words"], SPLITS=splits, **_layout(weight), num_warps=config["warps"],
        num_stages=config.get("stages", 3), **options(x),
    )  # fmt: skip
    if splits > 1:
        _sum_splits[(rows, triton.cdiv(weight.out_features, _SUM_TILE))](
            parts, bias, out, rows * weight.out_features, OUT=weight.out_features, SPLITS=splits,
            HAS_BIAS=bias is not None, TILE=_SUM_TILE, **options(x),
        )  # fmt: skip
    return out


def _layout(weight: BlockedWeight) -> dict[str, int | bool]:
    return {
        "IN": weight.in_features,
        "BITS": weight.bits,
        "BLOCK": weight.block,
        "GROUP_WORDS": weight.group_size * weight.bits // 32,
        "GROUPS": weight.scales.shape[1],
        "WORDS": weight.codes.shape[1],
        "HAS_ZEROS": weight.zeros is not None,
    }


@triton.jit
def _slope_and_offset(
    scale_ptr, zero_ptr, group, mask, n: tl.constexpr, BITS: tl.constexpr, HAS_ZEROS: tl.constexpr
):  # fmt: skip
    """a and b with scale * (q - zero) = a * (1 + q / 2^n) + b."""
    scale = tl.load(scale_ptr + group, mask=mask, other=0.0).to(tl.float32)
    if HAS_ZEROS:
        zero = tl.load(zero_ptr + group, mask=mask, other=0).to(tl.float32)
    else:
        zero = 2.0 ** (BITS - 1)
    return scale * 2.0**n, -scale * (2.0**n + zero)


@triton.jit
def _dequantise(
    w_ptr, scale_ptr, zero_ptr, out_ptr, rows, one,
    IN: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP_WORDS: tl.constexpr, GROUPS: tl.constexpr,
    WORDS: tl.constexpr, HAS_ZEROS: tl.constexpr, TILE_OUT: tl.constexpr, TILE_WORDS: tl.constexpr,
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
        a, b = _slope_and_offset(scale_ptr, zero_ptr, group, here, code_unit(j, BITS), BITS, HAS_ZEROS)
        w = code_as_float(words, one, j, BITS) * a + b
        i = column + j * BLOCK_WORDS
        tl.store(out_ptr + row.to(tl.int64) * IN + i, w.to(out_ptr.dtype.element_ty), mask=here & (i < IN))


@triton.jit
def _int_matmul(
    x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, y_ptr, rows, one,
    IN: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, GROUP_WORDS: tl.constexpr, GROUPS: tl.constexpr,
    WORDS: tl.constexpr, HAS_ZEROS: tl.constexpr, OUT: tl.constexpr, HAS_BIAS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_OUT: tl.constexpr, TILE_WORDS: tl.constexpr, SPLITS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    BLOCK_WORDS: tl.constexpr = BLOCK * BITS // 32
    ONE_GROUP: tl.constexpr = GROUP_WORDS % TILE_WORDS == 0  # a tile's columns share a row's scale
    PART: tl.constexpr = (WORDS + TILE_WORDS * SPLITS - 1) // (TILE_WORDS * SPLITS) * TILE_WORDS
    dtype = x_ptr.dtype.element_ty
    out = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    m = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    first = tl.program_id(2) * PART
    end = tl.minimum(first + PART, WORDS)
    word = tl.arange(0, TILE_WORDS)
    row = out[:, None]
    w_at = w_ptr + row * WORDS + word[None, :]
    words = tl.load(w_at + first, mask=(row < OUT) & (first + word < end)[None, :], other=0,
                    eviction_policy="evict_first")  # fmt: skip
    start_after_previous(OVERLAP)
    acc = tl.zeros([TILE_OUT, TILE_M], tl.float32)
    for start in range(first, end, TILE_WORDS):
        ahead = (start + TILE_WORDS + word)[None, :]
        following = tl.load(w_at + (start + TILE_WORDS), mask=(row < OUT) & (ahead < end), other=0,
                            eviction_policy="evict_first")  # fmt: skip
        at = start + word
        column = at // BLOCK_WORDS * BLOCK + at % BLOCK_WORDS
        if ONE_GROUP:
            group, here = row * GROUPS + start // GROUP_WORDS, row < OUT
        else:
            group, here = row * GROUPS + (at // GROUP_WORDS)[None, :], (row < OUT) & (at < end)[None, :]
        for j in tl.static_range(32 // BITS):
            a, b = _slope_and_offset(scale_ptr, zero_ptr, group, here, code_unit(j, BITS), BITS, HAS_ZEROS)
            w = (code_as_float(words, one, j, BITS) * a + b).to(dtype)
            i = column + j * BLOCK_WORDS
            inside = ((i < IN) & (at < end))[:, None] & (m < rows)[None, :]
            x = tl.load(x_ptr + m[None, :].to(tl.int64) * IN + i[:, None], mask=inside, other=0.0)
            acc = tl.dot(w, x, acc, input_precision="ieee")
        words = following
    y = acc
    if HAS_BIAS:
        y += tl.load(bias_ptr + out, mask=out < OUT, other=0.0).to(tl.float32)[:, None]
    place = (tl.program_id(2) * rows + m[None, :].to(tl.int64)) * OUT + row
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=(row < OUT) & (m < rows)[None, :])


@triton.jit
def _sum_splits(
    parts_ptr, bias_ptr, y_ptr, size,
    OUT: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    at = tl.program_id(0).to(tl.int64) * OUT + i
    y = tl.load(parts_ptr + at, mask=i < OUT, other=0.0)
    for split in tl.static_range(1, SPLITS):
        y += tl.load(parts_ptr + split * size.to(tl.int64) + at, mask=i < OUT, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + i, mask=i < OUT, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=i < OUT)
