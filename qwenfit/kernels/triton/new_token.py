"""The newest token of a sequence in a decoding step, where query heads share keys and values."""

from __future__ import annotations

import triton
import triton.language as tl

from qwenfit.kernels.triton.paged import scale_for


@triton.jit
def rotated(row_ptr, norm_ptr, mask, cos, sin, eps, DIM: tl.constexpr, HAS_NORM: tl.constexpr):
    """Heads [n, DIM] at `row_ptr` [n, 1], normalised (Qwen3) and rotated, rounded once to the model's dtype."""
    dtype = row_ptr.dtype.element_ty
    d = tl.arange(0, DIM)[None, :]
    other = (d + DIM // 2) % DIM
    x = tl.load(row_ptr + d, mask=mask, other=0.0).to(tl.float32)
    partner = tl.load(row_ptr + other, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
        x *= inverse * tl.load(norm_ptr + d).to(tl.float32)
        partner *= inverse * tl.load(norm_ptr + other).to(tl.float32)
    return (x * cos + partner * sin).to(dtype).to(tl.float32)


@triton.jit
def cached(
    x, cache_ptr, affine_ptr, vector, write, DIM: tl.constexpr, QUANTIZED: tl.constexpr
):  # fmt: skip
    """Store a new token's x [1, DIM] as vector number `vector` of the cache; returns it as later steps will read it."""
    at = vector * DIM + tl.arange(0, DIM)[None, :]
    if QUANTIZED:
        low, high = tl.min(x, axis=1)[:, None], tl.max(x, axis=1)[:, None]
        scale = scale_for(low, high)
        zero = -low / scale
        q = tl.floor((x - low) / scale + 0.5)
        one = tl.zeros([1, 1], tl.int32)
        tl.store(affine_ptr + vector * 2 + one, scale, mask=write & (one == 0))
        tl.store(affine_ptr + vector * 2 + 1 + one, zero, mask=write & (one == 0))
        tl.store(cache_ptr + at, q.to(tl.uint8), mask=write & (at >= 0))
        return (q - zero) * scale
    else:
        tl.store(cache_ptr + at, x.to(cache_ptr.dtype.element_ty), mask=write & (at >= 0))
        return x


@triton.jit
def group_query(
    q_ptr, query_scale_ptr, q_norm_ptr, k_norm_ptr, slots_ptr, centre_ptr,
    key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, cos, sin, eps, scale, row, kv_head, owns,
    FUSED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_CENTRE: tl.constexpr,
    DIM: tl.constexpr, HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr,
    QUANTIZED: tl.constexpr,
):  # fmt: skip
    """The queries of a group float32 [GROUP_TILE, DIM], and the new token as the first of those that they attend to:
    its scores [GROUP_TILE], 1 (0 where it belongs to another part, or is in the cache already) and value [1, DIM].

    Where it belongs here (`owns`), its key and value are written to the cache.
    """
    dtype = q_ptr.dtype.element_ty
    d = tl.arange(0, DIM)[None, :]
    member = tl.arange(0, GROUP_TILE)
    real = (member < GROUP)[:, None]
    head = kv_head * GROUP + member
    if FUSED:
        base = q_ptr + row.to(tl.int64) * (HEADS + 2 * KV_HEADS) * DIM
        q = rotated(base + (head * DIM)[:, None], q_norm_ptr, real, cos, sin, eps, DIM, HAS_NORM)
        if HAS_SCALE:
            q = (q * tl.load(query_scale_ptr + row).to(tl.float32)).to(dtype).to(tl.float32)
        zero_row = tl.zeros([1, 1], tl.int32)
        k_row = base + (HEADS + kv_head) * DIM + zero_row
        new_k = rotated(k_row, k_norm_ptr, zero_row == 0, cos, sin, eps, DIM, HAS_NORM)
        if HAS_CENTRE:
            new_k -= tl.load(centre_ptr + kv_head * DIM + d).to(tl.float32)
            new_k = new_k.to(dtype).to(tl.float32)
        new_v = tl.load(base + (HEADS + KV_HEADS + kv_head) * DIM + d).to(tl.float32)
        slot = tl.load(slots_ptr + row).to(tl.int64)
        vector = slot * KV_HEADS + kv_head
        write = (owns.to(tl.int32) + zero_row > 0) & (slot + zero_row >= 0)
        new_k = cached(new_k, key_ptr, key_affine_ptr, vector, write, DIM, QUANTIZED)
        new_v = cached(new_v, value_ptr, value_affine_ptr, vector, write, DIM, QUANTIZED)
        score = tl.where(owns, tl.sum(q * new_k, axis=1) * scale, -1e30)
        return q, score, tl.where(owns, 1.0, 0.0), new_v
    else:
        q = tl.load(q_ptr + ((row * HEADS + head) * DIM)[:, None] + d, mask=real, other=0.0).to(tl.float32)
        return q, tl.full([GROUP_TILE], -1e30, tl.float32), 0.0, tl.zeros([1, DIM], tl.float32)
