"""Products of a few activation rows with an int4 weight by the tensor cores, a lane of a warp at a time.

What a lane gives to a product of 16 x 8 x 32 (PTX: mma.m16n8k32) may be any of the columns, as long as the lanes that
hold the same columns of x give them in the same places. So a lane reads 16 bytes of each of its rows of the weight as
they lie in memory, and the same columns of x, and multiplies: nothing goes through shared memory, no warp waits for
another, and a code costs half an instruction. The activations are integers of 16 bits, whose high and low bytes are
multiplied apart (arrange.py). The warps of a program share its blocks of columns out, and add up at the end.
"""

# A kernel grows tuples as it is compiled, which Python's types cannot say.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.arrange import Arranged
from qwenfit.kernels.triton.int_matvec import BlockedWeight
from qwenfit.kernels.triton.launch import INTERPRETED, after_loads, options, prefetch_line, start_after_previous
from qwenfit.kernels.triton.layout import scale_in, zero_in
from qwenfit.kernels.triton.tuning import tuned

MAX_ROWS = 8
CHUNK = 4  # blocks that a warp multiplies one after the other: each of four lanes holds the scales of one


def has_int_lanes(weight: BlockedWeight, device: torch.device) -> bool:
    """Whether the weight is int4, each lane has 8 bytes of a row in a block, and the card compute capability 8.0."""
    return weight.bits == 4 and weight.block >= 64 and _has_mma(device)


@functools.cache
def _has_mma(device: torch.device) -> bool:
    return INTERPRETED or torch.cuda.get_device_capability(device) >= (8, 0)


def int_lanes(
    x: Arranged,
    weight: BlockedWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """`int_matvec_reference` of at most MAX_ROWS rows, arranged for lanes, with an int4 weight: one kernel.

    The result is of `dtype`; `out` may be `residual`. `config`: `tiles` of 16 rows of the weight that a program owns,
    an even number if gated, its `warps`, and how many chunks `ahead` a warp asks for the weight.
    """
    rows, outputs = x.rows, weight.out_features // (2 if gated else 1)
    if out is None:
        out = torch.empty(rows, outputs, dtype=dtype, device=x.units.device)
    config = config or tuned("int_lanes", (int(gated), weight.in_features, weight.out_features, rows))
    tiles, warps, blocks = config["tiles"], config["warps"], x.units.shape[1]
    _int_lanes[(triton.cdiv(weight.out_features, 16 * tiles),)](
        x.values.view(torch.int32), weight.codes, weight.scales, x.units, bias, residual, out,
        rows, outputs, triton.cdiv(blocks, warps * CHUNK), 0,
        BLOCKS=blocks, BYTES=weight.block // 2, GROUPS=weight.scales.shape[1],
        GROUP_BLOCKS=max(1, weight.group_size // weight.block),
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, GATED=gated, TILES=tiles, WARPS=warps,
        CHUNK=CHUNK, AHEAD=config["ahead"], INTERPRETED=INTERPRETED, num_warps=warps, **options(out),
    )  # fmt: skip
    return out


@triton.constexpr_function
def _load_text(count, kept):
    names = ", ".join(f"${i}" for i in range(count))
    return f"ld.global{'' if kept else '.L1::no_allocate'}.v{count}.b32 {{{names}}}, [${count}];"


@triton.jit
def _words(at, COUNT: tl.constexpr, KEPT: tl.constexpr, INTERPRETED: tl.constexpr):
    """The 2 or 4 words at each of the pointers `at` and after, by one load, as int32 tensors."""
    if INTERPRETED:
        words = ()
        for i in tl.static_range(COUNT):
            words = words + (tl.load(at + i),)  # noqa: RUF005
        return words
    elif COUNT == 2:
        return tl.inline_asm_elementwise(
            _load_text(2, KEPT), "=r,=r,l", [at], dtype=(tl.int32, tl.int32), is_pure=False, pack=1
        )
    else:
        return tl.inline_asm_elementwise(
            _load_text(4, KEPT), "=r,=r,=r,=r,l", [at], dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _bytes(words, SIGNED: tl.constexpr):
    """int32 [warps, 8, 16]: the bytes of the words of each four lanes."""
    even, odd = tl.join(words, words >> 8), tl.join(words >> 16, words >> 24)
    each = tl.join(even, odd).reshape([words.shape[0] // 32, 8, 16])
    return ((each & 255) ^ 128) - 128 if SIGNED else each & 255


@triton.jit
def _inner(a, b):
    """[warps, 8, 16] of rows of A and of columns of B -> their products as lanes hold them, int32 two [32 warps]."""
    both = tl.sum(a[:, :, None, :] * b[:, None, :, :], axis=3)  # [warps, 8, 8]
    even, odd = tl.split(both.reshape([a.shape[0], 8, 4, 2]))
    return even.reshape([a.shape[0] * 32]), odd.reshape([a.shape[0] * 32])


@triton.jit
def _mma(upper, lower, x, total, INTERPRETED: tl.constexpr):
    """total + A x of every warp. A's rows 0 to 7 are `upper`, 8 to 15 `lower`: two words of codes a lane, as of x."""
    if INTERPRETED:
        first, second = _bytes(x[0], True), _bytes(x[1], True)
        a, b = _inner(_bytes(upper[0], False), first), _inner(_bytes(upper[1], False), second)
        c, d = _inner(_bytes(lower[0], False), first), _inner(_bytes(lower[1], False), second)
        return total[0] + a[0] + b[0], total[1] + a[1] + b[1], total[2] + c[0] + d[0], total[3] + c[1] + d[1]
    else:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r",
            [upper[0], lower[0], upper[1], lower[1], x[0], x[1], total[0], total[1], total[2], total[3]],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _of_lane(x, lane, t: tl.constexpr, INTERPRETED: tl.constexpr):
    """What the lane `t` of each four holds, in all four."""
    if INTERPRETED:
        fours = x.reshape([x.shape[0] // 4, 4])
        own = tl.sum(tl.where(tl.arange(0, 4)[None, :] == t, fours, 0.0), axis=1, keep_dims=True)
        return (own + tl.zeros_like(fours)).reshape([x.shape[0]])
    else:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=f,f,r", [x, (lane & 28) + t], dtype=tl.float32,
            is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def _row(first, row, outputs, GATED: tl.constexpr):
    """Row `row` of a program's tiles, of which `first` is the first output. A gate's tile stands before its partner."""
    if GATED:
        return tl.minimum(first + row // 32 * 16 + row % 16, outputs - 1) + row // 16 % 2 * outputs
    else:
        return tl.minimum(first + row, outputs - 1)


@triton.jit
def _prefetch(
    w_ptr, first, chunk, lane, outputs, ROWS: tl.constexpr, BLOCKS: tl.constexpr, BYTES: tl.constexpr,
    CHUNK: tl.constexpr, GATED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Ask the second-level cache for a chunk of a program's rows, in whole lines."""
    LINES: tl.constexpr = CHUNK * BYTES // 128  # of a row
    if not INTERPRETED:
        for i in tl.static_range(ROWS * LINES // 32):
            line = i * 32 + lane
            word = tl.minimum(chunk * (CHUNK * BYTES // 4) + line % LINES * 32, BLOCKS * BYTES // 4 - 1)
            at = w_ptr + _row(first, line // LINES, outputs, GATED).to(tl.int64) * (BLOCKS * BYTES // 4) + word
            prefetch_line(at)


@triton.jit
def _weight_block(word_at, block, BYTES: tl.constexpr, INTERPRETED: tl.constexpr):
    """The words of each row of a lane in a block."""
    taken = ()
    for i in tl.static_range(len(word_at)):
        taken = taken + (_words(word_at[i] + block * (BYTES // 4), BYTES // 16, False, INTERPRETED),)  # noqa: RUF005
    return taken


@triton.jit
def _scales(at, block, BLOCKS: tl.constexpr, GROUP_BLOCKS: tl.constexpr):
    """The float32 scale of each row of a lane in `block`, or the word with its zero; 0 where there is no such block."""
    taken = ()
    for i in tl.static_range(len(at)):
        stored = tl.load(at[i] + block // GROUP_BLOCKS, mask=block < BLOCKS, other=0)
        taken = taken + (stored if stored.dtype.is_int() else stored.to(tl.float32),)  # noqa: RUF005
    return taken


@triton.jit
def _scale_and_zero(stored, lane, t: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 scale and zero that the lane `t` of each four holds in `_scales`."""
    if stored.dtype == tl.float32:
        return _of_lane(stored, lane, t, INTERPRETED), zero_in(stored, 4)
    elif stored.dtype == tl.int32 and not INTERPRETED:  # which exchanges floats, not bits
        word = _of_lane(stored.to(tl.float32, bitcast=True), lane, t, INTERPRETED).to(tl.int32, bitcast=True)
        return scale_in(word), zero_in(word, 4)
    else:
        return _of_lane(scale_in(stored), lane, t, INTERPRETED), _of_lane(zero_in(stored, 4), lane, t, INTERPRETED)


@triton.jit
def _x_block(
    x_at, unit_at, block, rows, BLOCKS: tl.constexpr, BYTES: tl.constexpr, INTERPRETED: tl.constexpr
):  # fmt: skip
    """A lane's words of x in a block, of high bytes and of low ones, and the units and sums of two rows of x."""
    PLANE: tl.constexpr = 4 * BYTES  # words
    at = x_at + block * (2 * PLANE)
    high = _words(at, BYTES // 16, True, INTERPRETED) + _words(at + PLANE // 2, BYTES // 16, True, INTERPRETED)
    at += PLANE
    low = _words(at, BYTES // 16, True, INTERPRETED) + _words(at + PLANE // 2, BYTES // 16, True, INTERPRETED)
    first, second, sums = unit_at[0] + block * rows, unit_at[1] + block * rows, BLOCKS * rows
    return high, low, (tl.load(first), tl.load(second), tl.load(first + sums), tl.load(second + sums))


@triton.jit
def _add_block(total, upper, lower, scales, zeros, x, nought, INTERPRETED: tl.constexpr):
    """total + scale (codes - zero) x of 16 rows of the weight in a block: a lane's four numbers."""
    high, low = (nought, nought, nought, nought), (nought, nought, nought, nought)
    HALF: tl.constexpr = len(upper)  # words of x before those that meet the high halves of the bytes
    for i in tl.static_range(HALF):
        a = (upper[i] & 0x0F0F0F0F, (upper[i] >> 4) & 0x0F0F0F0F)
        b = (lower[i] & 0x0F0F0F0F, (lower[i] >> 4) & 0x0F0F0F0F)
        high = _mma(a, b, (x[0][i], x[0][HALF + i]), high, INTERPRETED)
        low = _mma(a, b, (x[1][i], x[1][HALF + i]), low, INTERPRETED)
    units = x[2]
    a = ((high[0] << 8) + low[0]).to(tl.float32) * units[0] - zeros[0] * units[2]
    b = ((high[1] << 8) + low[1]).to(tl.float32) * units[1] - zeros[0] * units[3]
    c = ((high[2] << 8) + low[2]).to(tl.float32) * units[0] - zeros[1] * units[2]
    d = ((high[3] << 8) + low[3]).to(tl.float32) * units[1] - zeros[1] * units[3]
    return total[0] + scales[0] * a, total[1] + scales[0] * b, total[2] + scales[1] * c, total[3] + scales[1] * d


@triton.jit(do_not_specialize=["rows", "chunks", "nought"])
def _int_lanes(
    x_ptr, w_ptr, scale_ptr, unit_ptr, bias_ptr, residual_ptr, y_ptr, rows, outputs, chunks, nought,
    BLOCKS: tl.constexpr, BYTES: tl.constexpr, GROUPS: tl.constexpr, GROUP_BLOCKS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    TILES: tl.constexpr, WARPS: tl.constexpr, CHUNK: tl.constexpr, AHEAD: tl.constexpr,
    INTERPRETED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # Tensors are [32 WARPS], an element a thread, but for the last sum. BYTES: of a row in a block.
    OUTPUTS: tl.constexpr = 8 * TILES if GATED else 16 * TILES  # of a program
    output = tl.program_id(0) * OUTPUTS
    thread = tl.arange(0, 32 * WARPS)
    warp, lane = thread // 32, thread % 32
    word_at, scale_at = (), ()
    for half in tl.static_range(2 * TILES):  # of a tile: a lane has a row in each
        row = _row(output, lane // 4 + 8 * half, outputs, GATED).to(tl.int64)
        word_at = word_at + (w_ptr + row * (BLOCKS * BYTES // 4) + lane % 4 * (BYTES // 16),)  # noqa: RUF005
        scale_at = scale_at + (scale_ptr + row * GROUPS,)  # noqa: RUF005
    row = lane % 4 * 2
    unit_at = (unit_ptr + tl.minimum(row, rows - 1), unit_ptr + tl.minimum(row + 1, rows - 1))
    x_at = x_ptr + lane * (BYTES // 16)
    for ahead in tl.static_range(AHEAD):
        _prefetch(w_ptr, output, ahead * WARPS + warp, lane, outputs, 16 * TILES,
                  BLOCKS, BYTES, CHUNK, GATED, INTERPRETED)  # fmt: skip
    first = warp * CHUNK
    weights = _weight_block(word_at, tl.minimum(first, BLOCKS - 1), BYTES, INTERPRETED)
    scales = _scales(scale_at, first + lane % 4, BLOCKS, GROUP_BLOCKS)
    start_after_previous(OVERLAP)
    zero = tl.zeros([32 * WARPS], tl.float32)
    totals = ()
    for _ in tl.static_range(TILES):
        totals = totals + ((zero, zero, zero, zero),)  # noqa: RUF005
    x = _x_block(x_at, unit_at, tl.minimum(first, BLOCKS - 1), rows, BLOCKS, BYTES, INTERPRETED)
    for chunk in range(1, chunks + 1):
        next_first = (chunk * WARPS + warp) * CHUNK
        if chunk + AHEAD <= chunks:
            _prefetch(w_ptr, output, (chunk + AHEAD - 1) * WARPS + warp, lane, outputs, 16 * TILES,
                      BLOCKS, BYTES, CHUNK, GATED, INTERPRETED)  # fmt: skip
        next_scales = scales
        for j in tl.static_range(CHUNK):
            next_x, next_weights, origin = x, weights, nought
            if chunk * CHUNK + j < chunks * CHUNK + CHUNK - 1:  # not after the last one; a branch, for `after_loads`
                block = tl.minimum(first + j + 1 if j + 1 < CHUNK else next_first, BLOCKS - 1)
                next_x = _x_block(x_at, unit_at, block, rows, BLOCKS, BYTES, INTERPRETED)
                next_weights = _weight_block(word_at, block, BYTES, INTERPRETED)
                if j == 0:
                    next_scales = _scales(scale_at, next_first + lane % 4, BLOCKS, GROUP_BLOCKS)
                origin = after_loads(nought, INTERPRETED)
            following = ()
            for tile in tl.static_range(TILES):
                upper = _scale_and_zero(scales[2 * tile], lane, j, INTERPRETED)
                lower = _scale_and_zero(scales[2 * tile + 1], lane, j, INTERPRETED)
                following = following + (  # noqa: RUF005
                    _add_block(totals[tile], weights[2 * tile], weights[2 * tile + 1], (upper[0], lower[0]),
                               (upper[1], lower[1]), x, tl.zeros([32 * WARPS], tl.int32) + origin, INTERPRETED),
                )  # fmt: skip
            totals, weights, x = following, next_weights, next_x
        first, scales = next_first, next_scales
    tiles = ()
    for tile in tl.static_range(TILES):
        a, b, c, d = totals[tile]
        tiles = tiles + (tl.join(tl.join(a, b), tl.join(c, d)),)  # noqa: RUF005
    y = tl.sum(_stack(tiles, TILES).reshape([WARPS, 128 * TILES]), axis=0)  # of [32 lanes, 2 rows of x, 2, TILES]
    OWN: tl.constexpr = OUTPUTS // 16
    index = tl.arange(0, 128 * OWN)
    lane, m = index // (4 * OWN), index // (4 * OWN) % 4 * 2 + index // (2 * OWN) % 2
    output += index % OWN * 16 + index // OWN % 2 * 8 + lane // 4
    here = (m < rows) & (output < outputs)
    if GATED:
        gate, up = tl.split(y.reshape([128 * OWN, 2]))
        if HAS_BIAS:
            gate += tl.load(bias_ptr + output, mask=here, other=0.0).to(tl.float32)
            up += tl.load(bias_ptr + outputs + output, mask=here, other=0.0).to(tl.float32)
        y = gate * tl.sigmoid(gate) * up
    elif HAS_BIAS:
        y += tl.load(bias_ptr + output, mask=here, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + m * outputs + output, mask=here, other=0.0).to(tl.float32)
    tl.store(y_ptr + m * outputs + output, y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit
def _stack(tensors, COUNT: tl.constexpr):
    """Tensors [...] -> [..., COUNT], of a power of two of them."""
    if COUNT == 1:
        return tensors[0]
    elif COUNT == 2:
        return tl.join(tensors[0], tensors[1])
    else:
        even, odd = (), ()
        for i in tl.static_range(COUNT // 2):
            even = even + (tensors[2 * i],)  # noqa: RUF005
            odd = odd + (tensors[2 * i + 1],)  # noqa: RUF005
        return tl.join(_stack(even, COUNT // 2), _stack(odd, COUNT // 2))
