"""From the projected q, k, v of a step to rotated queries and a written KV cache, in one kernel.

`rotary_cache_reference` is the definition, made of the parts that the CPU runs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenfit.kernels.attention import LayerCache
from qwenfit.kernels.kv_quant import quantize_kv
from qwenfit.kernels.norm import rms_norm
from qwenfit.kernels.rotary import rotate
from qwenfit.kernels.triton.launch import options, start_after_previous
from qwenfit.kernels.triton.paged import scale_for

_EMBED_TILE = 1024


def rotary_cache_reference(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_scale: torch.Tensor | None,
    head_norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    slots: torch.Tensor,
    cache: LayerCache,
) -> torch.Tensor:
    """qkv [T, heads + 2 kv_heads, head_dim] -> queries [T, heads, head_dim]; keys and values enter the cache.

    cos and sin float32 [T, 1, head_dim] as `kernels.rotary.rotate` wants them; query_scale [T, 1, 1] (LogN); head_norms
    the weights [head_dim] of RMSNorm on q and k (Qwen3); slots int64 [T], -1: a padding row, which is not cached.
    """
    kv_heads = cache.key.shape[2]
    q, k, v = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    if head_norms is not None:
        q, k = rms_norm(q, head_norms[0], eps), rms_norm(k, head_norms[1], eps)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if query_scale is not None:
        q = q * query_scale
    real = slots >= 0
    for stored, affine, x in ((cache.key, cache.key_affine, k), (cache.value, cache.value_affine, v)):
        x = x[real]
        if affine is not None:
            x, scale_zero = quantize_kv(x)
            affine.flatten(0, 1)[slots[real]] = scale_zero
        stored.flatten(0, 1)[slots[real]] = x.to(stored.dtype)
    return q.contiguous()


def rotary_cache(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    query_scale: torch.Tensor | None,
    head_norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    slots: torch.Tensor,
    cache: LayerCache,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`rotary_cache_reference` in one kernel. qkv is contiguous; head_dim is a power of two."""
    tokens, all_heads, head_dim = qkv.shape
    kv_heads = cache.key.shape[2]
    heads = all_heads - 2 * kv_heads
    q = torch.empty(tokens, heads, head_dim, dtype=qkv.dtype, device=qkv.device) if out is None else out
    q_norm, k_norm = head_norms or (None, None)
    per_program = 4
    _rotary_cache[(tokens, triton.cdiv(all_heads, per_program))](
        qkv, cos, sin, query_scale, q_norm, k_norm, slots,
        q, cache.key, cache.value, cache.key_affine, cache.value_affine, eps,
        HEADS=heads, KV_HEADS=kv_heads, DIM=head_dim, PER_PROGRAM=per_program, HAS_SCALE=query_scale is not None,
        HAS_NORM=head_norms is not None, QUANTIZED=cache.key_affine is not None, num_warps=4, **options(qkv),
    )  # fmt: skip
    return q


@triton.jit
def _rotary_cache(
    qkv_ptr, cos_ptr, sin_ptr, query_scale_ptr, q_norm_ptr, k_norm_ptr, slots_ptr,
    q_ptr, key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PER_PROGRAM: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_NORM: tl.constexpr, QUANTIZED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * PER_PROGRAM + tl.arange(0, PER_PROGRAM)[:, None]
    d = tl.arange(0, DIM)[None, :]
    other = (d + DIM // 2) % DIM
    dtype = qkv_ptr.dtype.element_ty
    is_query, is_value = head < HEADS, head >= HEADS + KV_HEADS
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    inside = head < HEADS + 2 * KV_HEADS
    rotated = inside & (head < HEADS + KV_HEADS)
    row = qkv_ptr + (token * (HEADS + 2 * KV_HEADS) + head) * DIM
    x = tl.load(row + d, mask=inside, other=0.0)
    own, partner = x.to(tl.float32), tl.load(row + other, mask=rotated, other=0.0).to(tl.float32)
    if HAS_NORM:
        inverse = tl.rsqrt(tl.sum(own * own, axis=1) / DIM + eps)[:, None]
        weight = tl.where(is_query, tl.load(q_norm_ptr + d), tl.load(k_norm_ptr + d))
        weight_of_partner = tl.where(is_query, tl.load(q_norm_ptr + other), tl.load(k_norm_ptr + other))
        own, partner = own * inverse * weight.to(tl.float32), partner * inverse * weight_of_partner.to(tl.float32)
    cos, sin = tl.load(cos_ptr + token * DIM + d), tl.load(sin_ptr + token * DIM + d)
    x = tl.where(rotated, (own * cos + partner * sin).to(dtype), x)
    query = x
    if HAS_SCALE:
        query = (x.to(tl.float32) * tl.load(query_scale_ptr + token).to(tl.float32)).to(dtype)
    tl.store(q_ptr + (token * HEADS + head) * DIM + d, query, mask=is_query & (d < DIM))

    slot = tl.load(slots_ptr + token + tl.zeros([1, 1], tl.int32)).to(tl.int64)
    kv_head = tl.where(is_value, head - HEADS - KV_HEADS, head - HEADS)
    at = slot * KV_HEADS + kv_head
    cached = (slot >= 0) & inside & (head >= HEADS)
    if QUANTIZED:
        wide = x.to(tl.float32)
        low, high = tl.min(wide, axis=1)[:, None], tl.max(wide, axis=1)[:, None]
        scale = scale_for(low, high)
        x = tl.floor((wide - low) / scale + 0.5).to(tl.uint8)
        tl.store(key_affine_ptr + at * 2, scale, mask=cached & is_key)
        tl.store(key_affine_ptr + at * 2 + 1, -low / scale, mask=cached & is_key)
        tl.store(value_affine_ptr + at * 2, scale, mask=cached & is_value)
        tl.store(value_affine_ptr + at * 2 + 1, -low / scale, mask=cached & is_value)
    stored = x.to(key_ptr.dtype.element_ty)
    tl.store(key_ptr + at * DIM + d, stored, mask=cached & is_key & (d < DIM))
    tl.store(value_ptr + at * DIM + d, stored, mask=cached & is_value & (d < DIM))


def embed_with_angles(
    ids: torch.Tensor,
    table: torch.Tensor,
    positions: torch.Tensor,
    inverse: torch.Tensor,
    scaling: float,
    training_length: int | None,
    angles: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """table[ids] [T, hidden] and the angles of T decoding tokens, for `rotary_cache`, in one kernel.

    One token of each request, each with its own frequencies: ids and positions int64 [T]; inverse float32
    [T, head_dim / 2]. Writes cos and sin float32 [T, 1, head_dim], the first half of sin negated, and, with
    `training_length` S, the LogN factors [T, 1, 1]: log(position + 1) / log(S) past S, else 1.
    """
    tokens, hidden = len(ids), table.shape[1]
    out = torch.empty(tokens, hidden, dtype=table.dtype, device=table.device) if out is None else out
    half = inverse.shape[1]
    _embed_with_angles[(tokens, triton.cdiv(hidden, _EMBED_TILE))](
        ids, table, out, positions, inverse, *angles, scaling,
        LOGN=training_length or 0, HALF=half, LANES=triton.next_power_of_2(half), HIDDEN=hidden, TILE=_EMBED_TILE,
        **options(table),
    )  # fmt: skip
    return out


@triton.jit
def _embed_with_angles(
    ids_ptr, table_ptr, out_ptr, positions_ptr, inverse_ptr, cos_ptr, sin_ptr, query_scale_ptr, scaling,
    LOGN: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, HIDDEN: tl.constexpr, TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    token, part = tl.program_id(0), tl.program_id(1)
    i = part * TILE + tl.arange(0, TILE)
    x = tl.load(table_ptr + tl.load(ids_ptr + token).to(tl.int64) * HIDDEN + i, mask=i < HIDDEN, other=0.0)
    tl.store(out_ptr + token.to(tl.int64) * HIDDEN + i, x, mask=i < HIDDEN)
    if part == 0:
        d = tl.arange(0, LANES)
        position = tl.load(positions_ptr + token).to(tl.float32)
        radians = position * tl.load(inverse_ptr + token * HALF + d, mask=d < HALF, other=0.0)
        cos, sin = tl.cos(radians) * scaling, tl.sin(radians) * scaling
        at = token * 2 * HALF + d
        tl.store(cos_ptr + at, cos, mask=d < HALF)
        tl.store(cos_ptr + at + HALF, cos, mask=d < HALF)
        tl.store(sin_ptr + at, -sin, mask=d < HALF)
        tl.store(sin_ptr + at + HALF, sin, mask=d < HALF)
        if LOGN:
            count = tl.maximum(position + 1.0, 1.0 * LOGN)
            factor = tl.log(count) / tl.log(1.0 * LOGN + tl.zeros_like(count))
            tl.store(query_scale_ptr + token, factor.to(query_scale_ptr.dtype.element_ty))
