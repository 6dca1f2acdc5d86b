"""The kernel of decode_attention.py for models in which every query head has keys and values of its own (Qwen-1).

No matrix product is in it, so no tensor cores: a warp reads several tokens at once, a thread 16 bytes of each. Tensors
are [lanes, tokens, rounds, elements of a lane], laid out so that a thread keeps its tokens and its part of the head
throughout; only the scores are summed over the lanes, and the tokens once at the end. Uint8 keys meet the query as
16-bit integers, four to an instruction (see int_matvec.py).
"""

# A kernel grows tuples as it is compiled, which Python's types cannot say.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

import triton
import triton.language as tl

from qwenfit.kernels.triton.integers import dot_high, dot_low, low_bytes, second_bytes
from qwenfit.kernels.triton.launch import after_loads, start_after_previous
from qwenfit.kernels.triton.paged import blocks_of, scale_for, scale_of, zero_of
from qwenfit.kernels.triton.parts import is_last_to_arrive, merge_parts, part_of


@triton.jit
def _pack_bytes(x, PIECE: tl.constexpr, HIGH: tl.constexpr, INTERPRETED: tl.constexpr):
    """int32 [lanes, tokens, 1, PIECE] -> their lowest (or second) bytes, four to a word [..., PIECE / 4]."""
    even, odd = tl.split(x.reshape([x.shape[0], x.shape[1], 1, PIECE // 4, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    if HIGH:
        return second_bytes(a, b, c, d, INTERPRETED)
    else:
        return low_bytes(a, b, c, d, INTERPRETED)


@triton.jit
def _words_of(pieces, PIECE: tl.constexpr, HIGH: tl.constexpr, INTERPRETED: tl.constexpr):
    """As `_pack_bytes`, of one piece or of two that follow each other."""
    first = _pack_bytes(pieces[0], PIECE, HIGH, INTERPRETED)
    if len(pieces) == 1:
        return first
    else:
        second = _pack_bytes(pieces[1], PIECE, HIGH, INTERPRETED)
        both = tl.permute(tl.join(first, second), (0, 1, 2, 4, 3))
        return both.reshape([first.shape[0], first.shape[1], 1, 2 * first.shape[3]])


@triton.jit
def _over_head(pieces, MAXIMUM: tl.constexpr):
    """The sum or the maximum over the head, [1, tokens, 1, 1]."""
    x = pieces[0]
    if len(pieces) == 2:
        x = tl.maximum(x, pieces[1]) if MAXIMUM else x + pieces[1]
    if MAXIMUM:
        return tl.max(tl.max(x, axis=3, keep_dims=True), axis=0, keep_dims=True)
    else:
        return tl.sum(tl.sum(x, axis=3, keep_dims=True), axis=0, keep_dims=True)


@triton.jit
def _head(
    row_ptr, norm_ptr, turned, d, eps, DIM: tl.constexpr, HAS_NORM: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """A projected head as pieces of float32 [lanes, tokens, 1, PIECE]: normalised (Qwen3) and rotated, rounded once to
    the model's dtype. `d` holds the columns of each piece, `turned` its cos and sin.
    """
    dtype = row_ptr.dtype.element_ty
    pieces, partners = (), ()
    for h in tl.static_range(len(d)):
        pieces = pieces + (tl.load(row_ptr + d[h], mask=d[h] < DIM, other=0.0).to(tl.float32),)  # noqa: RUF005
        if ROTATED:
            other = (d[h] + DIM // 2) % DIM
            partners = partners + (tl.load(row_ptr + other).to(tl.float32),)  # noqa: RUF005
    if not ROTATED:
        return pieces
    else:
        if HAS_NORM:
            squares = ()
            for h in tl.static_range(len(d)):
                squares = squares + (pieces[h] * pieces[h],)  # noqa: RUF005
            inverse = tl.rsqrt(_over_head(squares, False) / DIM + eps)
        result = ()
        for h in tl.static_range(len(d)):
            x, partner = pieces[h], partners[h]
            if HAS_NORM:
                other = (d[h] + DIM // 2) % DIM
                x *= inverse * tl.load(norm_ptr + d[h], mask=d[h] < DIM, other=0.0).to(tl.float32)
                partner *= inverse * tl.load(norm_ptr + other).to(tl.float32)
            x = (x * turned[0][h] + partner * turned[1][h]).to(dtype).to(tl.float32)
            result = result + (tl.where(d[h] < DIM, x, 0.0),)  # noqa: RUF005
        return result


@triton.jit
def _quantized(pieces, d, DIM: tl.constexpr, PIECE: tl.constexpr, INTERPRETED: tl.constexpr):
    """`quantize_kv` of a head: (words, scale, zero)."""
    highs, lows = (), ()
    for h in tl.static_range(len(d)):
        highs = highs + (tl.where(d[h] < DIM, pieces[h], -1e38),)  # noqa: RUF005
        lows = lows + (tl.where(d[h] < DIM, -pieces[h], -1e38),)  # noqa: RUF005
    low = -_over_head(lows, True)
    scale = scale_for(low, _over_head(highs, True))
    codes = ()
    for h in tl.static_range(len(d)):
        code = tl.minimum(tl.floor((pieces[h] - low) / scale + 0.5), 255.0)
        codes = codes + (tl.where(d[h] < DIM, code, 0.0).to(tl.int32),)  # noqa: RUF005
    return _words_of(codes, PIECE, False, INTERPRETED), scale, -low / scale


@triton.jit
def _stored(
    pieces, d, element, lane, within, cache_ptr, affine_ptr, slot, head,
    HEADS: tl.constexpr, DIM: tl.constexpr, PIECE: tl.constexpr, QUANTIZED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write a new token's head to its slot in the cache, if it has one; returns it as `_tile` will read it."""
    dtype = cache_ptr.dtype.element_ty
    at, each = element + within * 0, lane + within * 0
    write = (within == 0) & (slot + within * 0 >= 0)
    vector = slot * HEADS + head
    if QUANTIZED:
        words, scale, zero = _quantized(pieces, d, DIM, PIECE, INTERPRETED)
        tl.store(cache_ptr + vector * (DIM // 4) + at, words, mask=write & (at < DIM // 4))
        low = scale.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
        affine = (zero.to(tl.int32, bitcast=True).to(tl.int64) << 32 | low) + each * 0
        tl.store(affine_ptr + vector + each * 0, affine, mask=write & (each == 0))
        return words, affine
    else:
        x = pieces[0].to(dtype)
        tl.store(cache_ptr + vector * DIM + at, x, mask=write & (at < DIM))
        return x, each


@triton.jit
def _tile(
    cache_ptr, affine_ptr, block, token, stop, head, lane, element,
    HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, ROW: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Keys or values of some tokens [lanes, tokens, rounds, elements], and the bits of their scales and zeros."""
    here = token < stop
    vector = (block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE) * HEADS + head
    x = tl.load(cache_ptr + vector * ROW + element, mask=here & (element < ROW), other=0)
    if QUANTIZED:
        return x, tl.load(affine_ptr + vector, mask=here, other=0)
    else:
        return x, lane * 0


@triton.jit
def _scale(affine):
    """[lanes, tokens, rounds]"""
    return scale_of(affine).reshape([affine.shape[0], affine.shape[1], affine.shape[2]])


@triton.jit
def _zero(affine):
    """[lanes, tokens, rounds]"""
    return zero_of(affine).reshape([affine.shape[0], affine.shape[1], affine.shape[2]])


@triton.constexpr_function
def _byte_at_8(byte):
    return f"prmt.b32 $0, $1, 0x3F800000, 0x76{byte}4;"


@triton.jit
def _byte_as_float(words, byte: tl.constexpr, INTERPRETED: tl.constexpr):
    """1 + byte / 2^15, made of bits."""
    if INTERPRETED:
        return ((((words >> 8 * byte) & 255) << 8) | 0x3F800000).to(tl.float32, bitcast=True)
    else:
        return tl.inline_asm_elementwise(
            _byte_at_8(byte), "=r,r", [words], dtype=tl.int32, is_pure=True, pack=1
        ).to(tl.float32, bitcast=True)  # fmt: skip


@triton.jit
def _absorb(
    state, query, k, key_affine, v, value_affine, here, origin, QUANTIZED: tl.constexpr, INTERPRETED: tl.constexpr
):
    """Attend to one tile more. `here` [1, tokens, rounds]; state and query as in `_attend_heads`."""
    top, total, weights, offsets, acc = state
    if QUANTIZED:
        high, low, unit, sums = query
        dots = dot_high(k, high, tl.zeros_like(k) + origin, INTERPRETED) << 8
        dots = tl.sum(dot_low(k, low, dots, INTERPRETED), axis=3)  # [lanes, tokens, rounds]
        points = _scale(key_affine) * (unit * (dots.to(tl.float32) - _zero(key_affine) * sums))
    else:
        points = tl.sum(k.to(tl.float32) * (query[0] + origin.to(tl.float32)), axis=3)
    points = tl.where(here, tl.sum(points, axis=0, keep_dims=True), -1e30)
    new_top = tl.maximum(top, tl.max(points, axis=2, keep_dims=True))
    shrink = tl.exp2(top - new_top)
    p = tl.where(here, tl.exp2(points - new_top), 0.0)  # [1, tokens, rounds]
    total = total * shrink + tl.sum(p, axis=2, keep_dims=True)
    wide = shrink[:, :, :, None]
    new_acc = ()
    if QUANTIZED:
        scaled = p * _scale(value_affine)
        weights = weights * shrink + tl.sum(scaled, axis=2, keep_dims=True)
        offsets = offsets * shrink + tl.sum(scaled * _zero(value_affine), axis=2, keep_dims=True)
        for byte in tl.static_range(4):
            parts = tl.sum(scaled[:, :, :, None] * _byte_as_float(v, byte, INTERPRETED), axis=2, keep_dims=True)
            new_acc = new_acc + (acc[byte] * wide + parts,)  # noqa: RUF005
    else:
        new_acc = (acc[0] * wide + tl.sum(p[:, :, :, None] * v.to(tl.float32), axis=2, keep_dims=True),)
    return new_top, total, weights, offsets, new_acc


@triton.jit
def _query(pieces, scale, PIECE: tl.constexpr, QUANTIZED: tl.constexpr, INTERPRETED: tl.constexpr):
    """The query in the form that `_absorb` takes: its bytes, unit and sums over each lane, or its floats."""
    ROUND: tl.constexpr = 12582912.0  # 1.5 * 2^23: added, a float's lowest bits are its nearest integer
    if QUANTIZED:
        sizes = ()
        for h in tl.static_range(len(pieces)):
            sizes = sizes + (tl.abs(pieces[h]),)  # noqa: RUF005
        top = tl.maximum(_over_head(sizes, True), 1e-30)
        integers = ()
        sums = None
        for h in tl.static_range(len(pieces)):
            x = pieces[h] * (32767.0 / top) + ROUND
            integers = integers + (x.to(tl.int32, bitcast=True),)  # noqa: RUF005
            part = tl.sum(x - ROUND, axis=3)
            sums = part if h == 0 else sums + part
        high = _words_of(integers, PIECE, True, INTERPRETED)
        low = _words_of(integers, PIECE, False, INTERPRETED)
        return high, low, top.reshape([1, top.shape[1], 1]) * (scale / 32767.0), sums
    else:
        return (pieces[0] * scale,)


@triton.jit(do_not_specialize=["splits"])
def _attend_heads(
    q_ptr, cos_ptr, sin_ptr, query_scale_ptr, q_norm_ptr, k_norm_ptr, slots_ptr, centre_ptr,
    key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, table_ptr, context_ptr, parts_ptr,
    partial_ptr, lse_ptr, arrived_ptr, out_ptr,
    scale, eps, table_stride, splits, nought,
    FUSED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_CENTRE: tl.constexpr,
    CUT: tl.constexpr, SPLITS: tl.constexpr, MOST: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr,
    HEADS: tl.constexpr, ROUNDS: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
    PIECE: tl.constexpr, BLOCK_SIZE: tl.constexpr, QUANTIZED: tl.constexpr, INTERPRETED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    if not FUSED:
        start_after_previous(OVERLAP)
    TILE: tl.constexpr = ROUNDS * TOKENS
    ELEMENTS: tl.constexpr = VECTOR // 4 if QUANTIZED else VECTOR  # words or numbers of a lane
    ROW: tl.constexpr = DIM // 4 if QUANTIZED else DIM
    head, part = tl.program_id(0), tl.program_id(1)
    row, start, stop, first_part, used = part_of(parts_ptr, context_ptr, part, SPLITS, TILE, CUT)
    owns = (part - first_part == used - 1) & (stop > start)  # the new token, which is not read from the cache
    if FUSED:
        stop -= owns.to(tl.int32)
    table_ptr += row * table_stride
    within = tl.arange(0, TOKENS)[None, :, None, None]
    lane = tl.arange(0, LANES)[:, None, None, None]
    element = lane * ELEMENTS + tl.arange(0, ELEMENTS)[None, None, None, :]
    # One number for each thread even where all lanes read the same: so it is where it is used.
    token = start + tl.arange(0, ROUNDS)[None, None, :, None] * TOKENS + within + lane * 0
    block = blocks_of(table_ptr, token, stop, BLOCK_SIZE)
    k, key_affine = _tile(key_ptr, key_affine_ptr, block, token, stop, head, lane, element,
                          HEADS, BLOCK_SIZE, ROW, QUANTIZED)  # fmt: skip
    v, value_affine = _tile(value_ptr, value_affine_ptr, block, token, stop, head, lane, element,
                            HEADS, BLOCK_SIZE, ROW, QUANTIZED)  # fmt: skip
    block = blocks_of(table_ptr, token + TILE, stop, BLOCK_SIZE)
    d = ()
    for h in tl.static_range(VECTOR // PIECE):
        d = d + (lane * VECTOR + h * PIECE + tl.arange(0, PIECE)[None, None, None, :] + within * 0,)  # noqa: RUF005
    turned = ()
    if FUSED:
        cos, sin = (), ()
        for h in tl.static_range(VECTOR // PIECE):
            cos = cos + (tl.load(cos_ptr + row * DIM + d[h], mask=d[h] < DIM, other=0.0),)  # noqa: RUF005
            sin = sin + (tl.load(sin_ptr + row * DIM + d[h], mask=d[h] < DIM, other=0.0),)  # noqa: RUF005
        turned = (cos, sin)
        slot = tl.load(slots_ptr + row).to(tl.int64)
        start_after_previous(OVERLAP)
    if part - first_part < used:
        dtype = q_ptr.dtype.element_ty
        base = q_ptr + (row.to(tl.int64) * (3 * HEADS if FUSED else HEADS) + head) * DIM
        pieces = _head(base, q_norm_ptr, turned, d, eps, DIM, HAS_NORM, FUSED)
        if HAS_SCALE:
            factor = tl.load(query_scale_ptr + row).to(tl.float32)
            scaled = ()
            for h in tl.static_range(len(pieces)):
                scaled = scaled + ((pieces[h] * factor).to(dtype).to(tl.float32),)  # noqa: RUF005
            pieces = scaled
        query = _query(pieces, scale, PIECE, QUANTIZED, INTERPRETED)
        top = tl.full([1, TOKENS, 1], -1e30, tl.float32)
        total = tl.zeros([1, TOKENS, 1], tl.float32)
        weights = tl.zeros([LANES, TOKENS, 1], tl.float32)
        offsets = tl.zeros([LANES, TOKENS, 1], tl.float32)
        acc = ()
        for _ in tl.static_range(4 if QUANTIZED else 1):
            acc = acc + (tl.zeros([LANES, TOKENS, 1, ELEMENTS], tl.float32),)  # noqa: RUF005
        state = (top, total, weights, offsets, acc)
        if FUSED:  # noqa: SIM102 (one is known as the kernel is compiled, the other is not)
            if owns:
                new_k = _head(base + HEADS * DIM, k_norm_ptr, turned, d, eps, DIM, HAS_NORM, True)
                if HAS_CENTRE:
                    centred = ()
                    for h in tl.static_range(len(new_k)):
                        centre = tl.load(centre_ptr + head * DIM + d[h], mask=d[h] < DIM, other=0.0).to(tl.float32)
                        centred = centred + ((new_k[h] - centre).to(dtype).to(tl.float32),)  # noqa: RUF005
                    new_k = centred
                new_v = _head(base + 2 * HEADS * DIM, k_norm_ptr, turned, d, eps, DIM, HAS_NORM, False)
                stored_k, stored_key_affine = _stored(
                    new_k, d, element, lane, within, key_ptr, key_affine_ptr, slot, head,
                    HEADS, DIM, PIECE, QUANTIZED, INTERPRETED,
                )  # fmt: skip
                stored_v, stored_value_affine = _stored(
                    new_v, d, element, lane, within, value_ptr, value_affine_ptr, slot, head,
                    HEADS, DIM, PIECE, QUANTIZED, INTERPRETED,
                )  # fmt: skip
                first = tl.arange(0, TOKENS)[None, :, None] == 0
                state = _absorb(state, query, stored_k, stored_key_affine, stored_v, stored_value_affine, first, nought,
                                QUANTIZED, INTERPRETED)  # fmt: skip
        for begin in range(start, stop, TILE):
            token = begin + tl.arange(0, ROUNDS)[None, None, :, None] * TOKENS + within + lane * 0
            next_k, next_key_affine, next_v, next_value_affine, next_block = k, key_affine, v, value_affine, block
            origin = nought
            if begin + TILE < stop:
                next_k, next_key_affine = _tile(key_ptr, key_affine_ptr, block, token + TILE, stop, head, lane, element,
                                                HEADS, BLOCK_SIZE, ROW, QUANTIZED)  # fmt: skip
                next_v, next_value_affine = _tile(value_ptr, value_affine_ptr, block, token + TILE, stop, head, lane,
                                                  element, HEADS, BLOCK_SIZE, ROW, QUANTIZED)  # fmt: skip
                next_block = blocks_of(table_ptr, token + 2 * TILE, stop, BLOCK_SIZE)
                origin = after_loads(nought, INTERPRETED)
            here = begin + tl.arange(0, ROUNDS)[None, None, :] * TOKENS + tl.arange(0, TOKENS)[None, :, None] < stop
            state = _absorb(state, query, k, key_affine, v, value_affine, here, origin, QUANTIZED, INTERPRETED)
            k, key_affine, v, value_affine, block = next_k, next_key_affine, next_v, next_value_affine, next_block
        _finish(
            state, partial_ptr, lse_ptr, arrived_ptr, out_ptr, part, first_part, used, row, head,
            splits, MOST, PARTS, HEADS, DIM, LANES, TOKENS, VECTOR, QUANTIZED,
        )  # fmt: skip


@triton.jit
def _finish(
    state, partial_ptr, lse_ptr, arrived_ptr, out_ptr, part, first_part, used, row, head, splits,
    MOST: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr,
    TOKENS: tl.constexpr, VECTOR: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Sum over the tokens and store. Where sequences are in parts, each warp may store one of its own, since waiting
    for the others costs more than their bytes; and the program of a head that comes last merges them all.
    """
    top, total, weights, offsets, acc = state
    if QUANTIZED:
        parts = ()
        for byte in tl.static_range(4):
            parts = parts + ((acc[byte] - weights[:, :, :, None]) * 32768.0 - offsets[:, :, :, None],)  # noqa: RUF005
        pairs = tl.join(tl.join(parts[0], parts[1]), tl.join(parts[2], parts[3]))
        x = tl.permute(pairs, (0, 1, 2, 3, 5, 4)).reshape([LANES, TOKENS, 1, VECTOR])
    else:
        x = acc[0]
    EACH: tl.constexpr = TOKENS // PARTS  # of the tokens that a program reads at once, those that a part sums over
    tops, totals = top.reshape([1, PARTS, EACH]), total.reshape([1, PARTS, EACH])
    highest = tl.max(tops, axis=2, keep_dims=True)
    weight = tl.exp2(tops - highest)
    total_of_part = tl.sum(totals * weight, axis=2)  # [1, PARTS]
    sums = tl.sum(x.reshape([LANES, PARTS, EACH, VECTOR]) * weight[:, :, :, None], axis=2)  # [LANES, PARTS, VECTOR]
    column = tl.arange(0, LANES)[:, None, None] * VECTOR + tl.arange(0, VECTOR)[None, None, :]
    result = sums / tl.maximum(total_of_part, 1e-30)[:, :, None]
    row_head = row * HEADS + head
    where, pointers = (part, first_part, used, row_head, head, splits), (partial_ptr, lse_ptr, arrived_ptr, out_ptr)
    if PARTS > 1:
        _store_part(result, highest, total_of_part, column, where, pointers, MOST, PARTS, DIM, LANES * VECTOR)
    else:
        if used == 1:
            tl.store(out_ptr + row_head * DIM + column, result.to(out_ptr.dtype.element_ty), mask=column < DIM)
        else:
            _store_part(result, highest, total_of_part, column, where, pointers, MOST, PARTS, DIM, LANES * VECTOR)


@triton.jit
def _store_part(
    result, highest, total, column, where, pointers,
    MOST: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    part, first_part, used, row_head, head, splits = where
    partial_ptr, lse_ptr, arrived_ptr, out_ptr = pointers
    place = (head.to(tl.int64) * splits + part) * PARTS + tl.arange(0, PARTS)[None, :]
    tl.store(partial_ptr + place[:, :, None] * DIM + column, result, mask=column < DIM)
    tl.store(lse_ptr + place, highest.reshape([1, PARTS]) + tl.log2(tl.maximum(total, 1e-30)))
    if is_last_to_arrive(arrived_ptr, row_head, used):
        first = (head * splits + first_part) * PARTS
        AT_ONCE: tl.constexpr = min(MOST, 64 if PARTS > 1 else 16)
        merge_parts(partial_ptr, lse_ptr, out_ptr, first, row_head, used * PARTS, MOST, AT_ONCE, DIM, LANES)
