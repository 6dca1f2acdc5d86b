"""The kernel of decode_attention.py for models whose query heads share int8 keys and values (GQA), in 16 bits.

Codes go to the tensor cores as float16 integers, made of their bits: 1,024 + code. With scales s and zeros z,

    sum q s_k (k - z_k) = s_k (sum q k - z_k sum q),    sum p s_v (v - z_v) = sum p' v - sum p' z_v with p' = p s_v,

where s_v goes into the exponent that makes p', so that what float16 holds is at most 1, and sum p = sum p' / s_v. Only
p' (v - 128) is of rounded p', so that it loses little of a value far from 0.

Of four bytes of a word each is a tensor of its own, [tokens, head_dim / 4]: columns j, 4 + j, 8 + j, ... of a head. So
no byte is packed again.
"""

# A kernel grows tuples as it is compiled, which Python's types cannot say.
# mypy: disable-error-code="assignment, misc, var-annotated"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.launch import start_after_previous
from qwenfit.kernels.triton.new_token import group_query
from qwenfit.kernels.triton.paged import blocks_of, scale_of, zero_of
from qwenfit.kernels.triton.parts import part_of

_OFFSET = tl.constexpr(1024)  # of a code as float16


def has_codes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `_attend_codes` is for queries of `dtype`: 16 bits, in heads of which a quarter fills a tensor core."""
    return dtype != torch.float32 and head_dim >= 64


@triton.constexpr_function
def _byte_as_half(j):
    return f"{{ .reg .b32 t; prmt.b32 t, $1, $2, 0x0{4 + j}0{j}; lop3.b32 $0, t, 0x00FF00FF, 0x64006400, 0xEA; }}"


@triton.jit
def _halves(words, j: tl.constexpr, INTERPRETED: tl.constexpr):
    """1,024 + byte j of each word, float16."""
    if INTERPRETED:
        return (((words >> 8 * j) & 255) + 1024).to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            _byte_as_half(j), "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2
        )  # fmt: skip


@triton.jit
def _columns(x):
    """[n, head_dim] as four [n, head_dim / 4]: columns j, 4 + j, ... of each j."""
    even, odd = tl.split(x.reshape([x.shape[0], x.shape[1] // 4, 2, 2]))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _tile(
    key_ptrs, value_ptrs, block, token, stop, kv_head,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Keys and values of some tokens, each int32 [tokens, WORDS] and the bits of their scales and zeros."""
    here = token < stop
    vector = (block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE) * KV_HEADS + kv_head
    at = vector[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    k = tl.load(key_ptrs[0] + at, mask=here[:, None], other=0)
    v = tl.load(value_ptrs[0] + at, mask=here[:, None], other=0)
    key_affine = tl.load(key_ptrs[1] + vector, mask=here, other=0)
    return k, key_affine, v, tl.load(value_ptrs[1] + vector, mask=here, other=0)


@triton.jit
def _absorb(state, query, tile, here, INTERPRETED: tl.constexpr):
    """Attend to one tile more. here [TILE]; state: the highest score, the sums of weights, of what is to be taken from
    every value, and of weighted values by columns.
    """
    top, total, offsets, acc = state
    queries, unit, sums, scale = query
    k, key_affine, v, value_affine = tile
    points = tl.zeros([sums.shape[0], here.shape[0]], tl.float32)
    for j in tl.static_range(4):
        points = tl.dot(queries[j], tl.trans(_halves(k, j, INTERPRETED)), points)
    points = points - sums * (zero_of(key_affine) + _OFFSET)[None, :]
    weight = tl.where(here, scale_of(value_affine), 1.0)
    points = points * (unit * (scale_of(key_affine) * scale)[None, :]) + tl.log2(weight)[None, :]
    points = tl.where(here[None, :], points, -1e30)
    new_top = tl.maximum(top, tl.max(points, axis=1))
    shrink = tl.exp2(top - new_top)
    exact = tl.exp2(points - new_top[:, None])
    p = exact.to(tl.float16)
    total = total * shrink + tl.sum(exact * (1.0 / weight)[None, :], axis=1)
    centred = p.to(tl.float32) * (_OFFSET + 128) + exact * (zero_of(value_affine) - 128.0)[None, :]
    offsets = offsets * shrink + tl.sum(centred, axis=1)
    new_acc = ()
    for j in tl.static_range(4):
        values = _halves(v, j, INTERPRETED)
        new_acc = new_acc + (tl.dot(p, values, acc[j] * shrink[:, None]),)  # noqa: RUF005
    return new_top, total, offsets, new_acc


@triton.jit(do_not_specialize=["splits"])
def _attend_codes(
    q_ptr, cos_ptr, sin_ptr, query_scale_ptr, q_norm_ptr, k_norm_ptr, slots_ptr, centre_ptr,
    key_ptr, value_ptr, key_affine_ptr, value_affine_ptr,
    key_words_ptr, value_words_ptr, key_pairs_ptr, value_pairs_ptr, table_ptr, context_ptr, parts_ptr,
    partial_ptr, lse_ptr, out_ptr, scale, eps, table_stride, splits,
    FUSED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_CENTRE: tl.constexpr,
    CUT: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, INTERPRETED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if not FUSED:
        start_after_previous(OVERLAP)
    WORDS: tl.constexpr = DIM // 4
    kv_head, part = tl.program_id(0), tl.program_id(1)
    row, start, stop, first_part, used = part_of(parts_ptr, context_ptr, part, SPLITS, TILE, CUT)
    owns = (part - first_part == used - 1) & (stop > start)  # the new token, which is not read from the cache
    if FUSED:
        stop -= owns.to(tl.int32)
    table_ptr += row * table_stride
    lane = tl.arange(0, TILE)
    key_ptrs, value_ptrs = (key_words_ptr, key_pairs_ptr), (value_words_ptr, value_pairs_ptr)
    if STAGES == 1:
        block = blocks_of(table_ptr, start + lane, stop, BLOCK_SIZE)
        tile = _tile(key_ptrs, value_ptrs, block, start + lane, stop, kv_head, KV_HEADS, BLOCK_SIZE, WORDS)
        block = blocks_of(table_ptr, start + TILE + lane, stop, BLOCK_SIZE)
    cos, sin = 0.0, 0.0
    if FUSED:
        d = tl.arange(0, DIM)[None, :]
        cos, sin = tl.load(cos_ptr + row * DIM + d), tl.load(sin_ptr + row * DIM + d)
        start_after_previous(OVERLAP)
    if part - first_part < used:
        q, top, mine, new_v = group_query(
            q_ptr, query_scale_ptr, q_norm_ptr, k_norm_ptr, slots_ptr, centre_ptr,
            key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, cos, sin, eps, scale, row, kv_head,
            owns,
            FUSED, HAS_SCALE, HAS_NORM, HAS_CENTRE, DIM, HEADS, KV_HEADS, GROUP, GROUP_TILE, True,
        )  # fmt: skip
        # The new token is not rounded, so it may weigh least in the exponent that all share.
        top = top - 30.0
        mine = mine * 2.0**30
        total = tl.zeros([GROUP_TILE], tl.float32) + mine
        offsets = tl.zeros([GROUP_TILE], tl.float32)
        unit = tl.exp2(tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(q), axis=1), 1e-30))))[:, None]  # loses no bit
        q = (q / unit).to(tl.float16)
        sums = tl.sum(q.to(tl.float32), axis=1)[:, None]
        queries, new_values = _columns(q), _columns(new_v)
        acc = ()
        for j in tl.static_range(4):
            acc = acc + (tl.zeros([GROUP_TILE, WORDS], tl.float32) + mine * new_values[j],)  # noqa: RUF005
        query, state = (queries, unit, sums, scale), (top, total, offsets, acc)
        if STAGES == 1:
            for first in range(start, stop, TILE):
                token = first + lane
                next_tile = _tile(
                    key_ptrs, value_ptrs, block, token + TILE, stop, kv_head, KV_HEADS, BLOCK_SIZE, WORDS
                )  # fmt: skip
                block = blocks_of(table_ptr, token + 2 * TILE, stop, BLOCK_SIZE)
                state = _absorb(state, query, tile, token < stop, INTERPRETED)
                tile = next_tile
        else:
            for first in tl.range(start, stop, TILE, num_stages=STAGES):
                token = first + lane
                block = blocks_of(table_ptr, token, stop, BLOCK_SIZE)
                tile = _tile(key_ptrs, value_ptrs, block, token, stop, kv_head, KV_HEADS, BLOCK_SIZE, WORDS)
                state = _absorb(state, query, tile, token < stop, INTERPRETED)
        top, total, offsets, acc = state
        member = tl.arange(0, GROUP_TILE)
        real = (member < GROUP)[:, None]
        column = 4 * tl.arange(0, WORDS)[None, :]
        head = kv_head * GROUP
        if used == 1:
            out = out_ptr + (row * HEADS + head + member).to(tl.int64)[:, None] * DIM + column
            for j in tl.static_range(4):
                result = (acc[j] - offsets[:, None]) / tl.maximum(total, 1e-30)[:, None]
                tl.store(out + j, result.to(out_ptr.dtype.element_ty), mask=real)
        else:
            place = (head + member).to(tl.int64) * splits + part
            for j in tl.static_range(4):
                result = (acc[j] - offsets[:, None]) / tl.maximum(total, 1e-30)[:, None]
                tl.store(partial_ptr + place[:, None] * DIM + column + j, result, mask=real)
            tl.store(lse_ptr + place, top + tl.log2(total), mask=member < GROUP)
