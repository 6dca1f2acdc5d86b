"""Products of a few activation rows with an int4 or int8 weight, at the speed of reading the weight.

`int_matvec_reference` is the definition. In the kernel a program owns some rows of the weight and walks along all of
the input, so nothing is split and sums have one order. A card's cores cannot convert each code to a float at the
speed of its memory, so the products are of integers, four to an instruction (dp4a): the activations that one thread
holds, 32 for int4 and 16 for int8, are rounded to 16 bits of their largest, in a high and a low byte. That is 128
times finer than bfloat16 rounds the largest, and exact sums follow.
"""

# A kernel grows tuples as it is compiled, which Python's types cannot say.
# mypy: disable-error-code="assignment, misc"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.launch import INTERPRETED, options, start_after_previous
from qwenfit.kernels.triton.layout import block_for, pack_codes, unpack_codes
from qwenfit.kernels.triton.tuning import tuned
from qwenfit.quantize.types import QuantizedWeight

MAX_ROWS = 16
ONE = 0x3F800000  # the bits of 1.0; an argument of the kernel, so that masking and setting them is one instruction


@dataclass
class BlockedWeight:
    """An int4 or int8 weight in the layout of layout.py."""

    bits: int
    group_size: int  # columns that share a scale
    block: int  # columns of a block of the layout
    out_features: int
    in_features: int
    codes: torch.Tensor  # int32 [out, words]
    scales: torch.Tensor  # [out, groups]
    zeros: torch.Tensor | None  # uint8 or float32 [out, groups]; None: the middle code throughout
    perm: torch.Tensor | None = None  # int64 [in]: column i of the weight meets x[perm[i]]

    @property
    def nbytes(self) -> int:
        tensors = (self.codes, self.scales, self.zeros, self.perm)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def pack_blocked(
    quantized: QuantizedWeight, dtype: torch.dtype, device: torch.device | str = "cuda"
) -> BlockedWeight | None:
    """Lay a weight out for activations of `dtype`; None if its groups are no multiple of 32 columns.

    Scales become float16 beside 16-bit activations, where that rounds them by at most 2^-11; else float32.
    """
    block = block_for(quantized.group_size, quantized.in_features)
    if not block:
        return None
    scales = quantized.scales.to(device).float()
    narrow = scales.half().float()
    if dtype != torch.float32 and bool(((narrow - scales).abs() <= scales.abs() * 2**-11).all()):
        scales = scales.half()
    zeros: torch.Tensor | None = quantized.zeros.to(device).float()
    assert zeros is not None
    if bool((zeros == 2 ** (quantized.bits - 1)).all()):
        zeros = None
    elif bool((zeros == zeros.round().clamp(0, 255)).all()):
        zeros = zeros.to(torch.uint8)
    group = quantized.group_size
    if group >= quantized.in_features:
        group = -(-quantized.in_features // block) * block
    return BlockedWeight(
        quantized.bits,
        group,
        block,
        quantized.out_features,
        quantized.in_features,
        pack_codes(quantized.q.to(device), quantized.bits, block),
        scales.contiguous(),
        zeros,
        None if quantized.perm is None else quantized.perm.to(device),
    )


def unpack_blocked(weight: BlockedWeight) -> QuantizedWeight:
    """Codes, float32 scales and zeros again."""
    scales = weight.scales.float()
    zeros = torch.full_like(scales, 2 ** (weight.bits - 1)) if weight.zeros is None else weight.zeros.float()
    q = unpack_codes(weight.codes, weight.bits, weight.block, weight.in_features)
    return QuantizedWeight(weight.bits, weight.group_size, q, scales, zeros, weight.perm)


def normalised(x: torch.Tensor, norm: torch.Tensor | None, eps: float) -> torch.Tensor:
    """RMSNorm of x [rows, in] in float32 with the weight `norm` [in], or x itself in float32."""
    x = x.float()
    return x if norm is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.float()


def finish(
    y: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, gated: bool, dtype: torch.dtype
) -> torch.Tensor:
    """The epilogue on float32 y [rows, out]: + bias, silu(first half) * second half, + residual."""
    if bias is not None:
        y = y + bias.float()
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
    if residual is not None:
        y = y + residual.float()
    return y.to(dtype)


def int_matvec_reference(
    x: torch.Tensor,
    weight: BlockedWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    gated: bool = False,
) -> torch.Tensor:
    """x [rows, in] -> [rows, out], or [rows, out / 2] when gated: float32 throughout, rounded to x's dtype once.

    `norm` [in] applies RMSNorm to x first, `gated` returns silu(first half of the outputs) * second half, `residual`
    [rows, outputs] is added last.
    """
    product = normalised(x, norm, eps) @ unpack_blocked(weight).dequantize(torch.float32).T
    return finish(product, bias, residual, gated, x.dtype)


def int_matvec(
    x: torch.Tensor,
    weight: BlockedWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    gated: bool = False,
    out: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """`int_matvec_reference` in one kernel, for at most MAX_ROWS contiguous rows. `out` may be `residual`."""
    rows, outputs = x.shape[0], weight.out_features // (2 if gated else 1)
    if out is None:
        out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    config = config or tuned("int_matvec", (weight.bits, weight.in_features, weight.out_features, rows))
    lanes = 1 << (rows - 1).bit_length()
    tiles = triton.cdiv(weight.out_features, config["rows"])
    programs = min(tiles, config["programs"])
    tile_words = min(config["words"], _power_of_two(weight.codes.shape[1]))
    _int_matvec[(programs,)](
        x, weight.codes, weight.scales, weight.zeros, bias, residual, norm, weight.perm, out,
        rows, eps, outputs, tiles, programs,
        IN=weight.in_features, OUT=weight.out_features, BITS=weight.bits, BLOCK=weight.block,
        GROUP_WORDS=weight.group_size * weight.bits // 32, GROUPS=weight.scales.shape[1],
        WORDS=weight.codes.shape[1], HAS_ZEROS=weight.zeros is not None, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, HAS_NORM=norm is not None, HAS_PERM=weight.perm is not None,
        GATED=gated, INTERPRETED=INTERPRETED, M=lanes, TILE_OUT=config["rows"], TILE_WORDS=tile_words,
        num_warps=config["warps"], **options(x),
    )  # fmt: skip
    return out


def _power_of_two(n: int) -> int:
    return 1 << max(2, (n - 1).bit_length())


@triton.jit
def code_as_float(words, one, j: tl.constexpr, BITS: tl.constexpr):
    """Code j of each word as the float 1 + q / 2^n; `code_unit` is n."""
    if BITS == 4:
        if j < 3:
            moved = words << 11
        elif j < 6:
            moved = words >> 1
        else:
            moved = words >> 9
    else:
        if j < 2:
            moved = words << 7
        else:
            moved = words >> 9
    mask: tl.constexpr = (2**BITS - 1) << (23 - code_unit(j, BITS))
    return ((moved & mask) | one).to(tl.float32, bitcast=True)


@triton.constexpr_function
def code_unit(j, bits):
    """n of `code_as_float`: how far below the mantissa's top code j ends up."""
    if bits == 4:
        return (12, 8, 4, 12, 8, 4, 8, 4)[j]
    return (16, 8, 16, 8)[j]


@triton.jit
def sum_quads(x):
    """[4 n, ...] -> [n, ...]: the sum over the four words that a thread holds."""
    return tl.sum(x.reshape([x.shape[0] // 4, 4, x.shape[1], x.shape[2]]), axis=1)


@triton.jit
def _max_of_quads(x):
    """The largest of each four along the first dimension, in all four places."""
    quads = x.reshape([x.shape[0] // 4, 4, x.shape[1], x.shape[2]])
    top = tl.max(quads, axis=1, keep_dims=True)
    return (top + tl.zeros_like(quads)).reshape(x.shape)


@triton.jit
def _low_bytes(a, b, c, d, INTERPRETED: tl.constexpr):
    """The lowest bytes of four words as one word, a's the lowest."""
    if INTERPRETED:
        return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (d & 255) << 24
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, u; prmt.b32 t, $1, $2, 0x0040; prmt.b32 u, $3, $4, 0x0040; prmt.b32 $0, t, u, 0x5410; }",
            "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _second_bytes(a, b, c, d, INTERPRETED: tl.constexpr):
    """As `_low_bytes`, of the bytes above the lowest."""
    if INTERPRETED:
        return _low_bytes(a >> 8, b >> 8, c >> 8, d >> 8, True)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, u; prmt.b32 t, $1, $2, 0x0051; prmt.b32 u, $3, $4, 0x0051; prmt.b32 $0, t, u, 0x5410; }",
            "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _dot_low(codes, x, acc, INTERPRETED: tl.constexpr):
    """acc + the dot product of four unsigned bytes and four unsigned bytes."""
    if INTERPRETED:
        for k in tl.static_range(4):
            acc += ((codes >> 8 * k) & 255) * ((x >> 8 * k) & 255)
        return acc
    else:
        return tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, acc], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _dot_high(codes, x, acc, INTERPRETED: tl.constexpr):
    """acc + the dot product of four unsigned bytes and four signed bytes."""
    if INTERPRETED:
        for k in tl.static_range(4):
            acc += ((codes >> 8 * k) & 255) * ((((x >> 8 * k) & 255) ^ 128) - 128)
        return acc
    else:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, acc], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _activations(
    x_ptr, norm_ptr, perm_ptr, at, batch, rows,
    j: tl.constexpr, IN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WORDS: tl.constexpr, WORDS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_PERM: tl.constexpr,
):  # fmt: skip
    """(x, x times the norm's weight) for code j of the words `at`, float32 [words, 1, rows of x]."""
    i = tl.max_contiguous(at // BLOCK_WORDS * BLOCK + at % BLOCK_WORDS, [4, 1, 1]) + j * BLOCK_WORDS
    inside = (i < IN) & (at < WORDS)
    if HAS_PERM:
        i = tl.load(perm_ptr + i, mask=inside, other=0)
    x = tl.load(x_ptr + batch * IN + i, mask=inside & (batch < rows), other=0.0).to(tl.float32)
    if HAS_NORM:
        return x, x * tl.load(norm_ptr + i, mask=inside, other=0.0).to(tl.float32)
    else:
        return x, x


@triton.jit
def _in_bytes(
    x_ptr, norm_ptr, perm_ptr, at, batch, rows,
    IN: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WORDS: tl.constexpr, WORDS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_PERM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The activations of the words `at` as 16-bit integers of a unit that the four words of a thread share.

    Returns words of high bytes and of low bytes (for int4 of the even codes, then of the odd), and of each four words
    the integers' sum, their unit, and the sum of squares of x before the norm.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    ROUND: tl.constexpr = 12582912.0  # 1.5 * 2^23: added, a float's lowest bits are its nearest integer
    x, top = (), None
    square = None
    for j in tl.static_range(PER_WORD):
        raw, weighted = _activations(x_ptr, norm_ptr, perm_ptr, at, batch, rows,
                                     j, IN, BLOCK, BLOCK_WORDS, WORDS, HAS_NORM, HAS_PERM)  # fmt: skip
        x = x + (weighted,)  # noqa: RUF005
        if j == 0:
            top, square = tl.abs(weighted), raw * raw
        else:
            top = tl.maximum(top, tl.abs(weighted))
            square += raw * raw
    top = tl.maximum(_max_of_quads(top), 1e-30)
    inverse = 32767.0 / top
    r, total = (), None
    for j in tl.static_range(PER_WORD):
        shifted = x[j] * inverse + ROUND
        r = r + (shifted.to(tl.int32, bitcast=True),)  # noqa: RUF005
        if j == 0:
            total = shifted - ROUND
        else:
            total += shifted - ROUND
    if BITS == 4:
        high = (_second_bytes(r[0], r[2], r[4], r[6], INTERPRETED), _second_bytes(r[1], r[3], r[5], r[7], INTERPRETED))
        low = (_low_bytes(r[0], r[2], r[4], r[6], INTERPRETED), _low_bytes(r[1], r[3], r[5], r[7], INTERPRETED))
    else:
        high = (_second_bytes(r[0], r[1], r[2], r[3], INTERPRETED),)
        low = (_low_bytes(r[0], r[1], r[2], r[3], INTERPRETED),)
    return high, low, sum_quads(total), sum_quads(top) * (0.25 / 32767.0), sum_quads(square)


@triton.jit
def _int_matvec(
    x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, norm_ptr, perm_ptr, y_ptr,
    rows, eps, outputs, tiles, programs,
    IN: tl.constexpr, OUT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    GROUP_WORDS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_PERM: tl.constexpr, GATED: tl.constexpr, INTERPRETED: tl.constexpr,
    M: tl.constexpr, TILE_OUT: tl.constexpr, TILE_WORDS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # Tensors are [words or quads of words, rows of the weight, rows of x]: with the input first, Triton gives every
    # load the same layout, a thread four consecutive words, and nothing goes through shared memory but the last sum.
    BLOCK_WORDS: tl.constexpr = BLOCK * BITS // 32
    WHOLE: tl.constexpr = TILE_WORDS >= WORDS  # a program holds all of x, and keeps it for all of its tiles
    word = tl.arange(0, TILE_WORDS)[:, None, None]
    quad = tl.arange(0, TILE_WORDS // 4)[:, None, None]
    batch = tl.arange(0, M)[None, None, :]
    first_row = row_of_tile(tl.program_id(0), OUT, TILE_OUT, GATED)[None, :, None]
    words = tl.load(w_ptr + first_row * WORDS + word, mask=(first_row < OUT) & (word < WORDS), other=0,
                    eviction_policy="evict_first")  # fmt: skip
    start_after_previous(OVERLAP)
    if WHOLE:
        high, low, sums, unit, squares = _in_bytes(
            x_ptr, norm_ptr, perm_ptr, word, batch, rows,
            IN, BITS, BLOCK, BLOCK_WORDS, WORDS, HAS_NORM, HAS_PERM, INTERPRETED,
        )  # fmt: skip
    for tile in range(tl.program_id(0), tiles, programs):
        row = row_of_tile(tile, OUT, TILE_OUT, GATED)[None, :, None]
        total = tl.zeros([TILE_WORDS // 4, TILE_OUT, M], tl.float32)
        if not WHOLE:
            squares = tl.zeros([TILE_WORDS // 4, 1, M], tl.float32)
        for start in range(0, WORDS, TILE_WORDS):
            last = start + TILE_WORDS >= WORDS
            next_row = row_of_tile(tl.where(last, tile + programs, tile), OUT, TILE_OUT, GATED)[None, :, None]
            next_word = tl.where(last, 0, start + TILE_WORDS) + word
            following = tl.load(w_ptr + next_row * WORDS + next_word, mask=(next_row < OUT) & (next_word < WORDS),
                                other=0, eviction_policy="evict_first")  # fmt: skip
            if not WHOLE:
                high, low, sums, unit, square = _in_bytes(
                    x_ptr, norm_ptr, perm_ptr, start + word, batch, rows,
                    IN, BITS, BLOCK, BLOCK_WORDS, WORDS, HAS_NORM, HAS_PERM, INTERPRETED,
                )  # fmt: skip
                squares += square
            acc = tl.zeros([TILE_WORDS, TILE_OUT, M], tl.int32)
            if BITS == 4:
                even, odd = words & 0x0F0F0F0F, (words >> 4) & 0x0F0F0F0F
                acc = _dot_high(even, high[0], acc, INTERPRETED)
                acc = _dot_high(odd, high[1], acc, INTERPRETED) << 8
                acc = _dot_low(even, low[0], acc, INTERPRETED)
                acc = _dot_low(odd, low[1], acc, INTERPRETED)
            else:
                acc = _dot_high(words, high[0], acc, INTERPRETED) << 8
                acc = _dot_low(words, low[0], acc, INTERPRETED)
            first = start + quad * 4
            group = row * GROUPS + first // GROUP_WORDS
            some = (row < OUT) & (first < WORDS)
            scale = tl.load(scale_ptr + group, mask=some, other=0.0).to(tl.float32)
            if HAS_ZEROS:
                zero = tl.load(zero_ptr + group, mask=some, other=0).to(tl.float32)
            else:
                zero = 2.0 ** (BITS - 1)
            total += scale * (unit * (sum_quads(acc).to(tl.float32) - sums * zero))
            words = following
        y = tl.sum(total, axis=0)  # [TILE_OUT, M]
        if HAS_NORM:
            y *= tl.rsqrt(tl.sum(squares, axis=0) / IN + eps)
        finish_tile(
            y, tile, bias_ptr, residual_ptr, y_ptr, rows, outputs,
            OUT, TILE_OUT, M, HAS_BIAS, HAS_RESIDUAL, GATED,
        )  # fmt: skip


@triton.jit
def row_of_tile(tile, OUT: tl.constexpr, TILE_OUT: tl.constexpr, GATED: tl.constexpr):
    """The rows of the weight in a tile; OUT and above: none. A gate's row stands beside its partner."""
    i = tile * TILE_OUT + tl.arange(0, TILE_OUT)
    if GATED:
        return tl.where(i < OUT, (i % 2) * (OUT // 2) + i // 2, OUT)
    else:
        return i


@triton.jit
def finish_tile(
    y, tile, bias_ptr, residual_ptr, y_ptr, rows, outputs,
    OUT: tl.constexpr, TILE_OUT: tl.constexpr, M: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """The epilogue (see `finish`) of a tile's sums y [TILE_OUT, M]."""
    batch = tl.arange(0, M)[None, :]
    if HAS_BIAS:
        row = row_of_tile(tile, OUT, TILE_OUT, GATED)
        y += tl.load(bias_ptr + row, mask=row < OUT, other=0.0).to(tl.float32)[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(y.reshape([TILE_OUT // 2, 2, M]), (0, 2, 1)))
        y = gate * tl.sigmoid(gate) * up
        output = tile * (TILE_OUT // 2) + tl.arange(0, TILE_OUT // 2)[:, None]
    else:
        output = tile * TILE_OUT + tl.arange(0, TILE_OUT)[:, None]
    store = (batch < rows) & (output < outputs)
    place = batch * outputs + output
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + place, mask=store, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=store)
