"""Products of activation rows with an int4 or int8 weight by the tensor cores, a block of columns at a time.

For some rows codes go to the tensor cores as bytes: the halves of an int4 byte, each less 8 and times 16, take three
instructions for four bytes, an int8 code has its highest bit turned, and no code becomes a float. The activations are
integers of 16 bits (arrange.py), whose high and low bytes stand beside each other in one exact product. For many rows a
code becomes a float less its middle, which bfloat16 holds exactly. The scale comes after either: no weight is ever
rounded. What a block is scaled with is asked for while the block before is multiplied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.arrange import Arranged
from qwenfit.kernels.triton.int_matvec import BlockedWeight, finish, unpack_blocked
from qwenfit.kernels.triton.launch import INTERPRETED, options, prefetch_rows, start_after_previous
from qwenfit.kernels.triton.layout import scale_in, zero_in
from qwenfit.kernels.triton.parts import room_for_parts, sum_parts
from qwenfit.kernels.triton.tuning import tuned


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
    """`int_matmul_reference`, [rows, out] of `dtype`, in one kernel. `out` may be `residual`.

    `config`: tiles of `m` rows of x and `rows` rows of the weight; the input is cut into `splits` parts, whose float32
    sums are added in order by the program that is done last; `warps`, `stages` and `unroll` are of the loop over
    blocks. With `floats` it was measured for x as it is, else for x as integers.
    """
    rows = x.rows
    if out is None:
        out = torch.empty(rows, weight.out_features, dtype=dtype, device=x.units.device)
    config = config or _tuned(weight, rows)
    tile_m, tile_out, splits, stages = config["m"], config["rows"], config.get("splits", 1), config.get("stages", 4)
    if x.values.dtype == torch.float32:  # of which a core holds half as much
        tile_m, stages = min(64, tile_m), 2
    blocks, tiles = x.units.shape[1], (triton.cdiv(rows, tile_m), triton.cdiv(weight.out_features, tile_out))
    parts, arrived = room_for_parts(splits, tiles[0] * tiles[1], tile_m * tile_out, out.device)
    _int_matmul[(*tiles, splits)](
        x.values, weight.codes.view(torch.int8), weight.scales, x.units, bias, residual, out, parts,
        arrived, rows, weight.out_features, blocks, weight.scales.shape[1], triton.cdiv(blocks, splits),
        BLOCK=weight.block, BITS=weight.bits, GROUP_BLOCKS=max(1, weight.group_size // weight.block),
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        TILE_M=tile_m, TILE_OUT=tile_out, SPLITS=splits, UNROLL=config.get("unroll", 1), WARPS=config["warps"],
        INTEGERS=x.integers, INTERPRETED=INTERPRETED, num_warps=config["warps"], num_stages=stages,
        **options(x.units),
    )  # fmt: skip
    return out


def prefers_integers(weight: BlockedWeight, rows: int) -> bool:
    """Whether so many rows of x are best arranged as integers for `int_matmul`."""
    return not _tuned(weight, rows).get("floats", 0)


def _tuned(weight: BlockedWeight, rows: int) -> dict[str, int]:
    return tuned("int_matmul", (weight.bits, weight.in_features, weight.out_features, rows))


@triton.jit
def _low_codes(codes, INTERPRETED: tl.constexpr):
    """16 (the low half of each byte - 8), which is the half moved up with its highest bit turned."""
    if INTERPRETED:
        return ((codes << 4) ^ -128) & -16
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; lop3.b32 $0, t, 0x80808080, 0xF0F0F0F0, 0x28; }",
            "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def _high_codes(codes, INTERPRETED: tl.constexpr):
    """16 (the high half of each byte - 8)."""
    if INTERPRETED:
        return (codes ^ -128) & -16
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x80808080, 0xF0F0F0F0, 0x28;", "=r,r", [codes], dtype=tl.int8, is_pure=True, pack=4
        )


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
def _half_at_float(high, zeros):
    """The assembly of `_half_floats`: bytes become bfloat16 of 128 + code, from which 136, or 128 + zero, are taken."""
    middle = "prmt.b32 middle, $3, 0xC3C3C3C3, 0x4140;" if zeros else "mov.b32 middle, 0xC308C308;"
    half = "shr.u32 t, $2, 4; and.b32 t, t, 0x0F0F0F0F;" if high else "and.b32 t, $2, 0x0F0F0F0F;"
    return (
        f"{{ .reg .b32 t, a, b, one, middle; mov.b32 one, 0x3F803F80; {middle} "
        f"{half} prmt.b32 a, t, 0x43434343, 0x4140; prmt.b32 b, t, 0x43434343, 0x4342; "
        "fma.rn.bf16x2 $0, a, one, middle; fma.rn.bf16x2 $1, b, one, middle; }"
    )


@triton.jit
def _half_floats(
    codes, zeros, dtype: tl.constexpr, HIGH: tl.constexpr, FOLDED: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """The high or the low half of each byte - 8, or, FOLDED, less the zero of its row, int8 [TILE_OUT, BYTES]."""
    if INTERPRETED or dtype != tl.bfloat16:
        half = ((codes >> 4 if HIGH else codes) & 15).to(tl.float32)
        return (half - (zeros.to(tl.float32) if FOLDED else 8.0)).to(dtype)
    elif FOLDED:
        return tl.inline_asm_elementwise(
            _half_at_float(HIGH, True), "=r,=r,r,r", [codes, zeros], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        return tl.inline_asm_elementwise(
            _half_at_float(HIGH, False), "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
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
def _less_middle(
    codes, scale, dtype: tl.constexpr, BITS: tl.constexpr, FOLDED: tl.constexpr, INTEGERS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """[TILE_OUT, BLOCK] of a block's bytes: its codes less their middle, as integers (of int4 16 times that) or floats.

    FOLDED: less the zeros that are with the scales. Of int4 those of the bytes' low halves, then of the high ones: one
    product waits once.
    """
    if BITS == 4:
        if INTEGERS:
            halves = tl.join(_low_codes(codes, INTERPRETED), _high_codes(codes, INTERPRETED))
        else:
            zeros = codes
            if FOLDED:
                zeros = tl.broadcast_to(zero_in(scale, BITS).to(tl.int8)[:, None], codes.shape)
            halves = tl.join(
                _half_floats(codes, zeros, dtype, False, FOLDED, INTERPRETED),
                _half_floats(codes, zeros, dtype, True, FOLDED, INTERPRETED),
            )
        return tl.permute(halves, (0, 2, 1)).reshape([codes.shape[0], 2 * codes.shape[1]])
    elif INTEGERS:
        return _signed_codes(codes, INTERPRETED)
    else:
        return _signed_floats(codes, dtype, INTERPRETED)


@triton.jit
def _of_block(
    scale_at, unit_at, block, rows, blocks,
    GROUP_BLOCKS: tl.constexpr, SUMS: tl.constexpr, INTEGERS: tl.constexpr,
):  # fmt: skip
    """What a block's products are multiplied with: scales as stored [TILE_OUT], units and sums [TILE_M]."""
    block = tl.minimum(block, blocks - 1)
    scale = tl.load(scale_at + block // GROUP_BLOCKS)
    unit, total = unit_at, unit_at
    if INTEGERS:
        unit = tl.load(unit_at + block * rows)
    if SUMS:
        total = tl.load(unit_at + (blocks + block) * rows)
    return scale, unit, total


@triton.jit(do_not_specialize=["rows", "blocks", "groups", "part"])
def _int_matmul(
    x_ptr, w_ptr, scale_ptr, unit_ptr, bias_ptr, residual_ptr, y_ptr, part_ptr, arrived_ptr,
    rows, outputs, blocks, groups, part,
    BLOCK: tl.constexpr, BITS: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    TILE_M: tl.constexpr, TILE_OUT: tl.constexpr, SPLITS: tl.constexpr, UNROLL: tl.constexpr, WARPS: tl.constexpr,
    INTEGERS: tl.constexpr, INTERPRETED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    BYTES: tl.constexpr = BLOCK * BITS // 8  # of a row in a block
    UNIT: tl.constexpr = 16 if INTEGERS and BITS == 4 else 1  # of the codes as they are multiplied
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)  # what is taken from them, and the zero of a weight without zeros
    FOLDED: tl.constexpr = BITS == 4 and not INTEGERS and scale_ptr.dtype.element_ty == tl.int32
    SUMS: tl.constexpr = scale_ptr.dtype.element_ty.is_int() and not FOLDED  # where groups have zeros of their own
    tile_m, tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    out = tile * TILE_OUT + tl.arange(0, TILE_OUT)
    row = tl.minimum(out, outputs - 1).to(tl.int64)  # rows beyond the end repeat the last one, and are not stored
    first = split * part
    if not INTERPRETED:
        prefetch_rows(w_ptr, tile * TILE_OUT, outputs, first * BYTES, blocks * BYTES, TILE_OUT, 2, WARPS)
    start_after_previous(OVERLAP)
    m = tile_m * TILE_M + tl.arange(0, TILE_M)
    w_at = w_ptr + row[:, None] * (blocks * BYTES) + tl.arange(0, BYTES)[None, :]
    n = tl.arange(0, 2 * TILE_M if INTEGERS else TILE_M)
    # Rows beyond the end begin anew: all programs at once at the last one would wait for one part of the cache.
    x_row = n // TILE_M * rows + (tile_m * TILE_M + n % TILE_M) % rows
    x_at = x_ptr + x_row[None, :].to(tl.int64) * (blocks * BLOCK) + tl.arange(0, BLOCK)[:, None]
    scale_at, unit_at = scale_ptr + row * groups, unit_ptr + tl.minimum(m, rows - 1)
    scale, unit, total = _of_block(scale_at, unit_at, first, rows, blocks, GROUP_BLOCKS, SUMS, INTEGERS)
    acc = tl.zeros([TILE_OUT, TILE_M], tl.float32)
    for block in tl.range(first, tl.minimum(first + part, blocks), loop_unroll_factor=UNROLL):
        codes = tl.load(w_at + block * BYTES, eviction_policy="evict_first")
        next_scale, next_unit, next_total = _of_block(
            scale_at, unit_at, block + 1, rows, blocks, GROUP_BLOCKS, SUMS, INTEGERS
        )  # a block ahead, so that nothing waits for them
        operand = _less_middle(codes, scale, x_ptr.dtype.element_ty, BITS, FOLDED, INTEGERS, INTERPRETED)
        x = tl.load(x_at + block * BLOCK)
        if INTEGERS:
            both = tl.dot(operand, x, out_dtype=tl.int32)  # of high bytes and of low ones
            top, rest = tl.split(tl.permute(both.reshape([TILE_OUT, 2, TILE_M]), (0, 2, 1)))
            dots = ((top << 8) + rest).to(tl.float32) * unit[None, :]
        else:
            if INTERPRETED:  # which has no product of bfloat16
                operand, x = operand.to(tl.float32), x.to(tl.float32)
            dots = tl.dot(operand, x, input_precision="ieee")
        if SUMS:
            dots -= ((zero_in(scale, BITS) - MIDDLE) * UNIT)[:, None] * total[None, :]
        acc += scale_in(scale)[:, None] * dots
        scale, unit, total = next_scale, next_unit, next_total
    acc *= 1.0 / UNIT
    last = True
    if SPLITS > 1:
        number = tile_m * tl.num_programs(1) + tile
        acc, last = sum_parts(acc, part_ptr, arrived_ptr, number, split, SPLITS)
    if last:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + row).to(tl.float32)[:, None]
        place = m[None, :].to(tl.int64) * outputs + out[:, None]
        real = (out < outputs)[:, None] & (m < rows)[None, :]
        if HAS_RESIDUAL:
            acc += tl.load(residual_ptr + place, mask=real, other=0.0).to(tl.float32)
        tl.store(y_ptr + place, acc.to(y_ptr.dtype.element_ty), mask=real)
