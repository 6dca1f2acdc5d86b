"""Products of a few activation rows with an int4 or int8 weight, at the speed of reading the weight.

`int_matvec_reference` is the definition. In the kernel a program owns some rows of the weight and walks along all of
the input, so nothing is split and sums have one order. Either it converts all of x once and holds it in registers, or
it converts each piece of x anew for every tile of rows. A card's cores cannot convert each code to a float at the
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

from qwenfit.kernels.triton.integers import dot_high, dot_low, low_bytes, second_bytes
from qwenfit.kernels.triton.launch import INTERPRETED, after_loads, options, start_after_previous
from qwenfit.kernels.triton.layout import (
    block_for,
    join_zeros,
    pack_codes,
    scale_in,
    split_zeros,
    unpack_codes,
    zero_in,
)
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
    scales: torch.Tensor  # [out, groups]: float16 or float32, or words of `join_zeros` that hold the zeros too
    perm: torch.Tensor | None = None  # int64 [in]: column i of the weight meets x[perm[i]]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (self.codes, self.scales, self.perm) if tensor is not None)

    @property
    def has_zeros(self) -> bool:
        """Whether each group has a zero of its own; else it is the middle code throughout."""
        return not self.scales.dtype.is_floating_point


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
    zeros = quantized.zeros.to(device).float()
    if bool((zeros != 2 ** (quantized.bits - 1)).any()):
        scales = join_zeros(scales, zeros, quantized.bits)
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
        None if quantized.perm is None else quantized.perm.to(device),
    )


def unpack_blocked(weight: BlockedWeight) -> QuantizedWeight:
    """Codes, float32 scales and zeros again."""
    if weight.has_zeros:
        scales, zeros = split_zeros(weight.scales)
    else:
        scales = weight.scales.float()
        zeros = torch.full_like(scales, 2 ** (weight.bits - 1))
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
    """`int_matvec_reference` in one kernel, for at most MAX_ROWS contiguous rows. `out` may be `residual`.

    `config`: a tile is `rows` of the weight by `words` of the input, and `programs` of `warps` share the tiles out.
    hold: all of x stays in registers, else only if it is no longer than `words`; then also registers: the most that a
    thread may have. early: loads come before the arithmetic.
    """
    rows, outputs = x.shape[0], weight.out_features // (2 if gated else 1)
    if out is None:
        out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    config = config or tuned("int_matvec", (weight.bits, weight.in_features, weight.out_features, rows))
    words = weight.codes.shape[1]
    tile_words = min(config["words"], _power_of_two(words))
    chunks = triton.cdiv(words, tile_words)
    tiles = triton.cdiv(weight.out_features, config["rows"])
    programs = min(tiles, config["programs"])
    arguments = (
        x, weight.codes, weight.scales, bias, residual, norm, weight.perm, out,
        rows, eps, outputs, tiles, programs, 0,
    )  # fmt: skip
    constants = dict(
        IN=weight.in_features, OUT=weight.out_features, BITS=weight.bits, BLOCK=weight.block,
        GROUP_WORDS=weight.group_size * weight.bits // 32, GROUPS=weight.scales.shape[1], WORDS=words,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        HAS_NORM=norm is not None, HAS_PERM=weight.perm is not None, GATED=gated, INTERPRETED=INTERPRETED,
        M=1 << (rows - 1).bit_length(), TILE_OUT=config["rows"], TILE_WORDS=tile_words,
        EARLY=bool(config.get("early", 1)), num_warps=config["warps"], **options(x),
    )  # fmt: skip
    if chunks == 1 or config.get("hold"):
        _int_matvec[(programs,)](*arguments, CHUNKS=chunks, maxnreg=config.get("registers"), **constants)
    else:
        _int_matvec_in_pieces[(programs,)](*arguments, **constants)
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
def _fours(x):
    """[..., 2, 2] -> its four tensors."""
    even, odd = tl.split(x)
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _quarters(x):
    """[4 n, rows, m] -> four tensors [n, rows, m]: the four words that a thread holds, each by itself."""
    return _fours(tl.permute(x.reshape([x.shape[0] // 4, 2, 2, x.shape[1], x.shape[2]]), (0, 3, 4, 1, 2)))


@triton.jit
def _column(at, j: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WORDS: tl.constexpr):
    """The column of code j of the words `at`."""
    return tl.max_contiguous(at // BLOCK_WORDS * BLOCK + at % BLOCK_WORDS, [4, 1, 1]) + j * BLOCK_WORDS


@triton.jit
def _there(i, at, IN: tl.constexpr, WORDS: tl.constexpr, PER_WORD: tl.constexpr):
    """Whether column i, in the words `at`, is one of the input: a row's last block may be padded."""
    if IN == WORDS * PER_WORD:
        return at < WORDS
    else:
        return (at < WORDS) & (i < IN)


@triton.jit
def _norm_weights(
    norm_ptr, perm_ptr, at, IN: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WORDS: tl.constexpr,
    WORDS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_PERM: tl.constexpr,
):  # fmt: skip
    """The norm's weights [words, 1, 1] for each code of the words `at`; an empty tuple without a norm."""
    norm = ()
    if HAS_NORM:
        for j in tl.static_range(32 // BITS):
            i = _column(at, j, BLOCK, BLOCK_WORDS)
            inside = _there(i, at, IN, WORDS, 32 // BITS)
            if HAS_PERM:
                i = tl.load(perm_ptr + i, mask=inside, other=0)
            norm = norm + (tl.load(norm_ptr + i, mask=inside, other=0.0),)  # noqa: RUF005
    return norm


@triton.jit
def _sum_of_bytes(high, low, INTERPRETED: tl.constexpr):
    """The sum of the integers of which words of `high` and `low` hold the bytes."""
    high_sum, low_sum = tl.zeros_like(low[0]), tl.zeros_like(low[0])
    ones = high_sum + 0x01010101
    for half in tl.static_range(len(high)):
        high_sum = dot_high(ones, high[half], high_sum, INTERPRETED)
        low_sum = dot_low(ones, low[half], low_sum, INTERPRETED)
    return ((high_sum << 8) + low_sum).to(tl.float32)


@triton.jit
def _in_bytes(
    x_ptr, norm, perm_ptr, at, batch, rows,
    IN: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WORDS: tl.constexpr, WORDS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_PERM: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """The activations of the words `at` as 16-bit integers of a unit that the four words of a thread share.

    Returns words of high bytes and of low bytes (for int4 of the even codes, then of the odd), each as the four words
    of a thread, and of each four words the integers' sum, their unit, and the sum of squares of x before the norm.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    ROUND: tl.constexpr = 12582912.0  # 1.5 * 2^23: added, a float's lowest bits are its nearest integer
    x, top = (), None
    square = None
    for j in tl.static_range(PER_WORD):
        i = _column(at, j, BLOCK, BLOCK_WORDS)
        inside = _there(i, at, IN, WORDS, PER_WORD)
        if HAS_PERM:
            i = tl.load(perm_ptr + i, mask=inside, other=0)
        raw = tl.load(x_ptr + batch * IN + i, mask=inside & (batch < rows), other=0.0).to(tl.float32)
        weighted = raw
        if HAS_NORM:
            weighted = raw * norm[j].to(tl.float32)
        x = x + (weighted,)  # noqa: RUF005
        if j == 0:
            top, square = tl.abs(weighted), raw * raw
        else:
            top = tl.maximum(top, tl.abs(weighted))
            square += raw * raw
    top = tl.maximum(_max_of_quads(top), 1e-30)
    inverse = 32767.0 / top
    r = ()
    for j in tl.static_range(PER_WORD):
        r = r + ((x[j] * inverse + ROUND).to(tl.int32, bitcast=True),)  # noqa: RUF005
    if BITS == 4:
        high = (second_bytes(r[0], r[2], r[4], r[6], INTERPRETED), second_bytes(r[1], r[3], r[5], r[7], INTERPRETED))
        low = (low_bytes(r[0], r[2], r[4], r[6], INTERPRETED), low_bytes(r[1], r[3], r[5], r[7], INTERPRETED))
        sums = sum_quads(_sum_of_bytes(high, low, INTERPRETED))
        # As one tensor: where the threads that convert are not those that multiply, it goes over in one exchange.
        words = tl.join(tl.join(high[0], high[1]), tl.join(low[0], low[1]))  # [words, 1, M, even or odd, high or low]
        words = words.reshape([words.shape[0] // 4, 2, 2, 1, words.shape[2], 2, 2])
        words = tl.permute(words, (0, 3, 4, 6, 5, 1, 2))  # [quads, 1, M, high or low, even or odd, 2, 2]
        a, b, c, d = _fours(words)
        a, b, c, d = _fours(a), _fours(b), _fours(c), _fours(d)
        high = ((a[0], b[0], c[0], d[0]), (a[1], b[1], c[1], d[1]))
        low = ((a[2], b[2], c[2], d[2]), (a[3], b[3], c[3], d[3]))
    else:
        high = (second_bytes(r[0], r[1], r[2], r[3], INTERPRETED),)
        low = (low_bytes(r[0], r[1], r[2], r[3], INTERPRETED),)
        sums = sum_quads(_sum_of_bytes(high, low, INTERPRETED))
        words = tl.join(high[0], low[0])  # [words, 1, M, high or low]
        words = words.reshape([words.shape[0] // 4, 2, 2, 1, words.shape[2], 2])
        words = tl.permute(words, (0, 3, 4, 5, 1, 2))  # [quads, 1, M, high or low, 2, 2]
        a, b, c, d = _fours(words)
        a, b, c, d = tl.split(a), tl.split(b), tl.split(c), tl.split(d)
        high, low = ((a[0], b[0], c[0], d[0]),), ((a[1], b[1], c[1], d[1]),)
    return high, low, sums, sum_quads(top) * (0.25 / 32767.0), sum_quads(square)


@triton.jit
def _dot_quads(words, high, low, origin, M: tl.constexpr, BITS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Codes times activations, summed over the four words that a thread holds; exact. For int4, 16 times that."""
    parts = _quarters(words)
    zero = tl.zeros([words.shape[0] // 4, words.shape[1], M], tl.int32) + origin
    if BITS == 4:
        # The odd codes stay where they are in their bytes, four bits up, and the even ones are moved up at the end.
        high_even, high_odd, low_even, low_odd = zero, zero, zero, zero
        for k in tl.static_range(4):
            even, odd = parts[k] & 0x0F0F0F0F, parts[k] & -0x0F0F0F10
            high_even = dot_high(even, high[0][k], high_even, INTERPRETED)
            high_odd = dot_high(odd, high[1][k], high_odd, INTERPRETED)
            low_even = dot_low(even, low[0][k], low_even, INTERPRETED)
            low_odd = dot_low(odd, low[1][k], low_odd, INTERPRETED)
        return (high_even << 12) + (high_odd << 8) + (low_even << 4) + low_odd
    else:
        high_sum, low_sum = zero, zero
        for k in tl.static_range(4):
            high_sum = dot_high(parts[k], high[0][k], high_sum, INTERPRETED)
            low_sum = dot_low(parts[k], low[0][k], low_sum, INTERPRETED)
        return (high_sum << 8) + low_sum


@triton.jit
def _weight_tile(
    w_ptr, scale_ptr, tile, start, TILE_WORDS: tl.constexpr, FULL: tl.constexpr,
    OUT: tl.constexpr, TILE_OUT: tl.constexpr, WORDS: tl.constexpr, GROUP_WORDS: tl.constexpr, GROUPS: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Words of a tile, and its scales as they are stored, from word `start` on. FULL: all words are there; else those
    that are not are anything.

    A thread's place in the first row is added to the pointer before the rows are: these are constants, and come into
    the load instruction itself.
    """
    at = start + tl.arange(0, TILE_WORDS)[:, None, None]
    first = start + tl.arange(0, TILE_WORDS // 4)[:, None, None] * 4
    row, lane = first_row(tile, TILE_OUT, GATED), row_in_tile(OUT, TILE_OUT, GATED)[None, :, None]
    word_ptr = w_ptr + row * WORDS + at + lane * WORDS
    group = row * GROUPS + first // GROUP_WORDS
    lane *= GROUPS
    mask, some = None, None
    if OUT % TILE_OUT != 0:
        here = (tile * TILE_OUT + tl.arange(0, TILE_OUT) < OUT)[None, :, None]
        mask, some = here & (at < WORDS), here & (first < WORDS)
    elif not FULL:
        mask, some = at < WORDS, first < WORDS
    words = tl.load(word_ptr, mask=mask, eviction_policy="evict_first")
    return words, tl.load(scale_ptr + group + lane, mask=some)


@triton.jit(do_not_specialize=["tiles", "programs"])
def _int_matvec(
    x_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, norm_ptr, perm_ptr, y_ptr,
    rows, eps, outputs, tiles, programs, nought,
    IN: tl.constexpr, OUT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    GROUP_WORDS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_PERM: tl.constexpr, GATED: tl.constexpr, INTERPRETED: tl.constexpr,
    M: tl.constexpr, TILE_OUT: tl.constexpr, TILE_WORDS: tl.constexpr, CHUNKS: tl.constexpr,
    EARLY: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # Tensors are [words or quads of words, rows of the weight, rows of x]: with the input first, Triton gives every
    # load the same layout, a thread four consecutive words, and nothing goes through shared memory but the last sum.
    # A program holds all of x, as CHUNKS of TILE_WORDS words, and walks along a tile's rows chunk by chunk.
    FACTOR: tl.constexpr = 16 if BITS == 4 else 1  # of `_dot_quads`
    BLOCK_WORDS: tl.constexpr = BLOCK * BITS // 32
    word = tl.arange(0, TILE_WORDS)[:, None, None]
    batch = tl.arange(0, M)[None, None, :]
    words, scale = _weight_tile(
        w_ptr, scale_ptr, tl.program_id(0), 0, TILE_WORDS, TILE_WORDS <= WORDS,
        OUT, TILE_OUT, WORDS, GROUP_WORDS, GROUPS, GATED,
    )  # fmt: skip
    norms, held = (), ()
    for c in tl.static_range(CHUNKS):
        norms = norms + (_norm_weights(norm_ptr, perm_ptr, c * TILE_WORDS + word,  # noqa: RUF005
                                       IN, BITS, BLOCK, BLOCK_WORDS, WORDS, HAS_NORM, HAS_PERM),)  # fmt: skip
    start_after_previous(OVERLAP)
    squares = tl.zeros([TILE_WORDS // 4, 1, M], tl.float32)
    for c in tl.static_range(CHUNKS):
        high, low, sums, unit, square = _in_bytes(
            x_ptr, norms[c], perm_ptr, c * TILE_WORDS + word, batch, rows,
            IN, BITS, BLOCK, BLOCK_WORDS, WORDS, HAS_NORM, HAS_PERM, INTERPRETED,
        )  # fmt: skip
        held = held + ((high, low, sums * unit, unit),)  # noqa: RUF005
        squares += square
    if HAS_NORM:
        inverse = tl.rsqrt(tl.sum(squares, axis=0) / IN + eps)  # [1, M]
    for tile in range(tl.program_id(0), tiles, programs):
        bias, residual = tile_operands(
            tile, bias_ptr, residual_ptr, rows, outputs, OUT, TILE_OUT, M, HAS_BIAS, HAS_RESIDUAL, GATED
        )
        total = tl.zeros([TILE_WORDS // 4, TILE_OUT, M], tl.float32)
        for c in tl.static_range(CHUNKS):
            next_tile = tile + nought  # with 0 the branch below goes, and the loads with it behind the arithmetic
            if c + 1 == CHUNKS:
                next_tile += programs
            next_words, next_scale, origin = words, scale, nought
            if next_tile < tiles:
                next_words, next_scale = _weight_tile(
                    w_ptr, scale_ptr, next_tile, (c + 1) % CHUNKS * TILE_WORDS,
                    TILE_WORDS, ((c + 1) % CHUNKS + 1) * TILE_WORDS <= WORDS,
                    OUT, TILE_OUT, WORDS, GROUP_WORDS, GROUPS, GATED,
                )  # fmt: skip
                if EARLY:
                    origin = after_loads(nought, INTERPRETED)
            dots = _dot_quads(words, held[c][0], held[c][1], origin, M, BITS, INTERPRETED).to(tl.float32)
            dots *= held[c][3] / FACTOR
            dots -= held[c][2] * zero_in(scale, BITS)
            total += scale_in(scale) * dots
            words, scale = next_words, next_scale
        y = tl.sum(total, axis=0)  # [TILE_OUT, M]
        if HAS_NORM:
            y *= inverse
        finish_tile(y, tile, bias, residual, y_ptr, rows, outputs, TILE_OUT, M, HAS_BIAS, HAS_RESIDUAL, GATED)


@triton.jit(do_not_specialize=["tiles", "programs"])
def _int_matvec_in_pieces(
    x_ptr, w_ptr, scale_ptr, bias_ptr, residual_ptr, norm_ptr, perm_ptr, y_ptr,
    rows, eps, outputs, tiles, programs, nought,
    IN: tl.constexpr, OUT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    GROUP_WORDS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_PERM: tl.constexpr, GATED: tl.constexpr, INTERPRETED: tl.constexpr,
    M: tl.constexpr, TILE_OUT: tl.constexpr, TILE_WORDS: tl.constexpr, EARLY: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    # As `_int_matvec`, for x that registers do not hold: a tile's words and the x beside them are taken together.
    BLOCK_WORDS: tl.constexpr = BLOCK * BITS // 32
    FACTOR: tl.constexpr = 16 if BITS == 4 else 1  # of `_dot_quads`
    word = tl.arange(0, TILE_WORDS)[:, None, None]
    batch = tl.arange(0, M)[None, None, :]
    FULL: tl.constexpr = WORDS % TILE_WORDS == 0
    words, scale = _weight_tile(w_ptr, scale_ptr, tl.program_id(0), 0, TILE_WORDS, FULL,
                                OUT, TILE_OUT, WORDS, GROUP_WORDS, GROUPS, GATED)  # fmt: skip
    start_after_previous(OVERLAP)
    for tile in range(tl.program_id(0), tiles, programs):
        bias, residual = tile_operands(
            tile, bias_ptr, residual_ptr, rows, outputs, OUT, TILE_OUT, M, HAS_BIAS, HAS_RESIDUAL, GATED
        )
        total = tl.zeros([TILE_WORDS // 4, TILE_OUT, M], tl.float32)
        squares = tl.zeros([TILE_WORDS // 4, 1, M], tl.float32)
        for start in range(0, WORDS, TILE_WORDS):
            last = start + TILE_WORDS >= WORDS
            next_tile = tl.where(last, tile + programs, tile)
            next_words, next_scale, origin = words, scale, nought
            if next_tile < tiles:
                next_words, next_scale = _weight_tile(
                    w_ptr, scale_ptr, next_tile, tl.where(last, 0, start + TILE_WORDS),
                    TILE_WORDS, FULL, OUT, TILE_OUT, WORDS, GROUP_WORDS, GROUPS, GATED,
                )  # fmt: skip
                if EARLY:
                    origin = after_loads(nought, INTERPRETED)
            norm = _norm_weights(norm_ptr, perm_ptr, start + word,
                                 IN, BITS, BLOCK, BLOCK_WORDS, WORDS, HAS_NORM, HAS_PERM)  # fmt: skip
            high, low, sums, unit, square = _in_bytes(
                x_ptr, norm, perm_ptr, start + word, batch, rows,
                IN, BITS, BLOCK, BLOCK_WORDS, WORDS, HAS_NORM, HAS_PERM, INTERPRETED,
            )  # fmt: skip
            squares += square
            dots = _dot_quads(words, high, low, origin, M, BITS, INTERPRETED).to(tl.float32) * (unit / FACTOR)
            dots -= unit * sums * zero_in(scale, BITS)
            total += scale_in(scale) * dots
            words, scale = next_words, next_scale
        y = tl.sum(total, axis=0)  # [TILE_OUT, M]
        if HAS_NORM:
            y *= tl.rsqrt(tl.sum(squares, axis=0) / IN + eps)
        finish_tile(y, tile, bias, residual, y_ptr, rows, outputs, TILE_OUT, M, HAS_BIAS, HAS_RESIDUAL, GATED)


@triton.jit
def first_row(tile, TILE_OUT: tl.constexpr, GATED: tl.constexpr):
    """The row of the weight that a tile begins with."""
    return tile * (TILE_OUT // 2 if GATED else TILE_OUT)


@triton.jit
def row_in_tile(OUT: tl.constexpr, TILE_OUT: tl.constexpr, GATED: tl.constexpr):
    """The rows of a tile, counted from its first. A gate's row stands beside its partner."""
    lane = tl.arange(0, TILE_OUT)
    if GATED:
        return lane // 2 + lane % 2 * (OUT // 2)
    else:
        return lane


@triton.jit
def row_of_tile(tile, OUT: tl.constexpr, TILE_OUT: tl.constexpr, GATED: tl.constexpr):
    """The rows of the weight in a tile, and whether they are there. A gate's row stands beside its partner."""
    here = tile * TILE_OUT + tl.arange(0, TILE_OUT) < OUT
    return first_row(tile, TILE_OUT, GATED) + row_in_tile(OUT, TILE_OUT, GATED), here


@triton.jit
def _outputs_of_tile(tile, rows, outputs, TILE_OUT: tl.constexpr, M: tl.constexpr, GATED: tl.constexpr):
    """Where a tile's outputs [its outputs, M] stand in y [rows, outputs], and whether they are there."""
    OUTPUTS: tl.constexpr = TILE_OUT // 2 if GATED else TILE_OUT
    batch = tl.arange(0, M)[None, :]
    output = tile * OUTPUTS + tl.arange(0, OUTPUTS)[:, None]
    return batch * outputs + output, (batch < rows) & (output < outputs)


@triton.jit
def tile_operands(
    tile, bias_ptr, residual_ptr, rows, outputs,
    OUT: tl.constexpr, TILE_OUT: tl.constexpr, M: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """The bias [TILE_OUT] and the residual of a tile; loaded before its products, so that they are there in the end."""
    bias, residual = 0.0, 0.0
    if HAS_BIAS:
        row, here = row_of_tile(tile, OUT, TILE_OUT, GATED)
        bias = tl.load(bias_ptr + row, mask=here, other=0.0)
    if HAS_RESIDUAL:
        place, there = _outputs_of_tile(tile, rows, outputs, TILE_OUT, M, GATED)
        residual = tl.load(residual_ptr + place, mask=there, other=0.0)
    return bias, residual


@triton.jit
def finish_tile(
    y, tile, bias, residual, y_ptr, rows, outputs,
    TILE_OUT: tl.constexpr, M: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """The epilogue (see `finish`) of a tile's sums y [TILE_OUT, M]."""
    if HAS_BIAS:
        y += bias.to(tl.float32)[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(y.reshape([TILE_OUT // 2, 2, M]), (0, 2, 1)))
        y = gate * tl.sigmoid(gate) * up
    if HAS_RESIDUAL:
        y += residual.to(tl.float32)
    place, there = _outputs_of_tile(tile, rows, outputs, TILE_OUT, M, GATED)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=there)
