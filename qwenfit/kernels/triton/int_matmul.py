"""Products of activation rows with an int4 or int8 weight by the tensor cores, a block of columns at a time.

For some rows codes go to the tensor cores as they are: an int4 byte is split by one mask and one shift, an int8 code
has its highest bit turned, and no code becomes a float. The activations are integers of 16 bits (arrange.py), so a
block takes two exact products, of high and of low bytes. For many rows a code becomes a float less its middle, which
bfloat16 holds exactly, for one product. The scale comes after either: no weight is ever rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.arrange import Arranged
from qwenfit.kernels.triton.int_matvec import BlockedWeight, finish, unpack_blocked
from qwenfit.kernels.triton.launch import INTERPRETED, options, start_after_previous
from qwenfit.kernels.triton.tuning import tuned

_SUM_TILE = 1024


def has_int_matmul(weight: BlockedWeight) -> bool:
    """Whether a block has the 32 bytes of a row that the tensor cores want at once."""
    return weight.block * weight.bits >= 32 * 8


def int_matmul_reference(
    x: torch.Tensor,
    weight: BlockedWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [rows, in] -> [rows, out]: times the weight in float32, + bias [out], + residual [rows, out], rounded once."""
    product = x.float() @ unpack_blocked(weight).dequantize(torch.float32).T
    return finish(product, bias, residual, False, x.dtype)


def int_matmul(
    x: Arranged,
    weight: BlockedWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """`int_matmul_reference`, [rows, out] of `dtype`, in one kernel, or two where the input is split.

    `config`: tiles of `m` rows of x and `rows` rows of the weight; the input is cut into `splits` parts, whose float32
    sums are added in order; `warps`, `stages` and `unroll` are of the loop over blocks. With `floats` it was measured
    for x as it is, else for x as integers.
    """
    rows = x.rows
    if out is None:
        out = torch.empty(rows, weight.out_features, dtype=dtype, device=x.units.device)
    config = config or _tuned(weight, rows)
    tile_m, tile_out, splits = config["m"], config["rows"], config.get("splits", 1)
    blocks = x.units.shape[1]
    target, last_bias, last_residual = out, bias, residual
    if splits > 1:
        target = torch.empty(splits, rows, weight.out_features, dtype=torch.float32, device=out.device)
        last_bias, last_residual = None, None
    _int_matmul[(triton.cdiv(rows, tile_m), triton.cdiv(weight.out_features, tile_out), splits)](
        x.values, weight.codes.view(torch.int8), weight.scales, weight.zeros, x.units, last_bias, last_residual,
        target, rows, triton.cdiv(blocks, splits),
        OUT=weight.out_features, BLOCKS=blocks, BLOCK=weight.block, BITS=weight.bits,
        GROUPS=weight.scales.shape[1], GROUP_BLOCKS=max(1, weight.group_size // weight.block),
        HAS_ZEROS=weight.zeros is not None, HAS_BIAS=last_bias is not None, HAS_RESIDUAL=last_residual is not None,
        TILE_M=tile_m, TILE_OUT=tile_out, UNROLL=config.get("unroll", 1), INTEGERS=x.integers, INTERPRETED=INTERPRETED,
        num_warps=config["warps"], num_stages=config.get("stages", 4), **options(x.units),
    )  # fmt: skip
    return sum_splits(target, bias, residual, out) if splits > 1 else out


def sum_splits(
    parts: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """out [rows, outputs] = the sum of parts [splits, rows, outputs] in order, + bias + residual; returns out."""
    splits, rows, outputs = parts.shape
    _sum_splits[(rows, triton.cdiv(outputs, _SUM_TILE))](
        parts, bias, residual, out, rows * outputs, OUT=outputs, SPLITS=splits,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, TILE=_SUM_TILE, **options(out),
    )  # fmt: skip
    return out


def prefers_integers(weight: BlockedWeight, rows: int) -> bool:
    """Whether so many rows of x are best arranged as integers for `int_matmul`."""
    return not _tuned(weight, rows).get("floats", 0)


def _tuned(weight: BlockedWeight, rows: int) -> dict[str, int]:
    return tuned("int_matmul", (weight.bits, weight.in_features, weight.out_features, rows))


@triton.jit
def _low_codes(codes, INTERPRETED: tl.constexpr):
    """The low half of each byte."""
    if INTERPRETED:
        return codes & 15
    else:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0x0F0F0F0F;", "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4
        )


@triton.jit
def _high_codes(codes, INTERPRETED: tl.constexpr):
    """The high half of each byte."""
    if INTERPRETED:
        return (codes >> 4) & 15
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shr.u32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F; }",
            "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def _signed_codes(codes, INTERPRETED: tl.constexpr):
    """Each byte - 128."""
    if INTERPRETED:
        return codes ^ -128
    else:
        return tl.inline_asm_elementwise(
            "xor.b32 $0, $1, 0x80808080;", "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4
        )


@triton.constexpr_function
def _half_at_float(high):
    """The assembly of `_half_floats`: two bytes become two bfloat16 of 128 + code, from which 136 are taken."""
    half = "shr.u32 t, $2, 4; and.b32 t, t, 0x0F0F0F0F;" if high else "and.b32 t, $2, 0x0F0F0F0F;"
    return (
        "{ .reg .b32 t, a, b, one, middle; mov.b32 one, 0x3F803F80; mov.b32 middle, 0xC308C308; "
        f"{half} prmt.b32 a, t, 0x43434343, 0x4140; prmt.b32 b, t, 0x43434343, 0x4342; "
        "fma.rn.bf16x2 $0, a, one, middle; fma.rn.bf16x2 $1, b, one, middle; }"
    )


@triton.jit
def _half_floats(codes, dtype: tl.constexpr, HIGH: tl.constexpr, INTERPRETED: tl.constexpr):
    """The high or the low half of each byte - 8."""
    if INTERPRETED or dtype != tl.bfloat16:
        return (((codes >> 4 if HIGH else codes) & 15).to(tl.float32) - 8.0).to(dtype)
    else:
        return tl.inline_asm_elementwise(
            _half_at_float(HIGH), "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )


@triton.jit
def _signed_floats(codes, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Each byte - 128, by way of the float 2^23 + byte."""
    if INTERPRETED or dtype != tl.bfloat16:
        return (codes ^ -128).to(tl.float32).to(dtype)
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 h; .reg .f32 a, b, c, d; mov.b32 h, 0x4B000000;
            prmt.b32 a, $2, h, 0x7650; prmt.b32 b, $2, h, 0x7651;
            prmt.b32 c, $2, h, 0x7652; prmt.b32 d, $2, h, 0x7653;
            add.f32 a, a, 0fCB000080; add.f32 b, b, 0fCB000080; add.f32 c, c, 0fCB000080; add.f32 d, d, 0fCB000080;
            cvt.rn.bf16x2.f32 $0, b, a; cvt.rn.bf16x2.f32 $1, d, c; }""",
            "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def _float_dots(codes, x_at, here, BITS: tl.constexpr, BYTES: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 [TILE_OUT, TILE_M]: a block's codes less their middle times the numbers at `x_at` [BYTES, TILE_M]."""
    dtype: tl.constexpr = x_at.dtype.element_ty
    x = tl.load(x_at, mask=here, other=0.0)
    if BITS == 4:
        dots = tl.dot(_half_floats(codes, dtype, False, INTERPRETED), x, input_precision="ieee")
        x = tl.load(x_at + BYTES, mask=here, other=0.0)
        return tl.dot(_half_floats(codes, dtype, True, INTERPRETED), x, dots, input_precision="ieee")
    else:
        return tl.dot(_signed_floats(codes, dtype, INTERPRETED), x, input_precision="ieee")


@triton.jit
def _integer_dots(codes, x_at, plane, here, BITS: tl.constexpr, BYTES: tl.constexpr, INTERPRETED: tl.constexpr):
    """int32 [TILE_OUT, TILE_M]: a block's codes times the integers at `x_at` [BYTES, TILE_M] and `plane` further.

    Of int8 codes - 128.
    """
    if BITS == 4:
        low, high = _low_codes(codes, INTERPRETED), _high_codes(codes, INTERPRETED)
        top = tl.dot(low, tl.load(x_at, mask=here, other=0), out_dtype=tl.int32)
        top = tl.dot(high, tl.load(x_at + BYTES, mask=here, other=0), top, out_dtype=tl.int32)
        rest = tl.dot(low, tl.load(x_at + plane, mask=here, other=0), out_dtype=tl.int32)
        rest = tl.dot(high, tl.load(x_at + plane + BYTES, mask=here, other=0), rest, out_dtype=tl.int32)
    else:
        signed = _signed_codes(codes, INTERPRETED)
        top = tl.dot(signed, tl.load(x_at, mask=here, other=0), out_dtype=tl.int32)
        rest = tl.dot(signed, tl.load(x_at + plane, mask=here, other=0), out_dtype=tl.int32)
    return (top << 8) + rest


@triton.jit(do_not_specialize=["rows", "part"])
def _int_matmul(
    x_ptr, w_ptr, scale_ptr, zero_ptr, unit_ptr, bias_ptr, residual_ptr, y_ptr, rows, part,
    OUT: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, GROUPS: tl.constexpr,
    GROUP_BLOCKS: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    TILE_M: tl.constexpr, TILE_OUT: tl.constexpr, UNROLL: tl.constexpr, INTEGERS: tl.constexpr,
    INTERPRETED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    BYTES: tl.constexpr = BLOCK * BITS // 8  # of a row in a block
    TAKEN: tl.constexpr = 128 if BITS == 8 else 0 if INTEGERS else 8  # from the codes, before they are multiplied
    MIDDLE: tl.constexpr = 2 ** (BITS - 1) - TAKEN  # the zero of a weight without zeros, among the codes as multiplied
    start_after_previous(OVERLAP)
    out = tl.program_id(1) * TILE_OUT + tl.arange(0, TILE_OUT)
    row = tl.minimum(out, OUT - 1).to(tl.int64)  # rows beyond the end repeat the last one, and are not stored
    m = tl.program_id(0) * TILE_M + tl.arange(0, TILE_M)
    k = tl.arange(0, BYTES)
    here = (m < rows)[None, :]
    w_at = w_ptr + row[:, None] * (BLOCKS * BYTES) + k[None, :]
    x_at = x_ptr + m[None, :].to(tl.int64) * (BLOCKS * BLOCK) + k[:, None]
    plane = rows.to(tl.int64) * (BLOCKS * BLOCK)
    acc = tl.zeros([TILE_OUT, TILE_M], tl.float32)
    first = tl.program_id(2) * part
    for block in tl.range(first, tl.minimum(first + part, BLOCKS), loop_unroll_factor=UNROLL):
        codes = tl.load(w_at + block * BYTES, eviction_policy="evict_first")
        if INTEGERS:
            dots = _integer_dots(codes, x_at + block * BLOCK, plane, here, BITS, BYTES, INTERPRETED).to(tl.float32)
        else:
            dots = _float_dots(codes, x_at + block * BLOCK, here, BITS, BYTES, INTERPRETED)
        group = row * GROUPS + block // GROUP_BLOCKS
        scale = tl.load(scale_ptr + group).to(tl.float32)[:, None]
        unit_at = unit_ptr + block * rows + m
        if INTEGERS:
            dots = dots * tl.load(unit_at, mask=m < rows, other=0.0)[None, :]
        if HAS_ZEROS or MIDDLE != 0:
            sums = tl.load(unit_at + BLOCKS * rows, mask=m < rows, other=0.0)[None, :]
            if HAS_ZEROS:
                dots -= (tl.load(zero_ptr + group).to(tl.float32)[:, None] - TAKEN) * sums
            else:
                dots -= MIDDLE * sums
        acc += scale * dots
    if HAS_BIAS:
        acc += tl.load(bias_ptr + row).to(tl.float32)[:, None]
    place = (tl.program_id(2) * rows + m[None, :].to(tl.int64)) * OUT + out[:, None]
    real = (out < OUT)[:, None] & here
    if HAS_RESIDUAL:
        acc += tl.load(residual_ptr + place, mask=real, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, acc.to(y_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["size"])
def _sum_splits(
    parts_ptr, bias_ptr, residual_ptr, y_ptr, size,
    OUT: tl.constexpr, SPLITS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    at = tl.program_id(0).to(tl.int64) * OUT + i
    y = tl.load(parts_ptr + at, mask=i < OUT, other=0.0)
    for split in tl.static_range(1, SPLITS):
        y += tl.load(parts_ptr + split * size.to(tl.int64) + at, mask=i < OUT, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + i, mask=i < OUT, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + at, mask=i < OUT, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=i < OUT)
