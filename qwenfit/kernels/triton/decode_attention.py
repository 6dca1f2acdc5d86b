"""Attention of one query for each sequence over the paged cache, the sequences split into parts (Flash-Decoding).

`decode_attention_reference` is the definition. Shapes and lengths that change from step to step are read from device
tensors and the grid depends on none of them, so a CUDA graph of a step stays right as the sequences grow.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from qwenfit.kernels.attention import LayerCache
from qwenfit.kernels.kv_quant import dequantize_kv
from qwenfit.kernels.triton.decode_codes import _attend_codes, has_codes
from qwenfit.kernels.triton.decode_heads import ARRIVED_STRIDE, _attend_heads, merge_parts
from qwenfit.kernels.triton.launch import INTERPRETED, options, start_after_previous
from qwenfit.kernels.triton.new_token import group_query
from qwenfit.kernels.triton.paged import blocks_of, split_length
from qwenfit.kernels.triton.tuning import tuned

_PROGRAMS_PER_CORE = 4
_MAX_SPLITS = 64


def decode_attention_reference(
    q: torch.Tensor,
    cache: LayerCache,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """q [B, heads, head_dim] -> [B, heads * head_dim]: softmax(scale q k^T) v, in float32.

    block_tables int32 [B, max_blocks]; context_lens [B] counts cached tokens, this step's included; a row of length 0
    (padding) gives zeros. Query head h reads kv head h // (heads / kv_heads).
    """
    out = torch.zeros_like(q)
    size = cache.key.shape[1]
    for row, length in enumerate(context_lens.tolist()):
        if length == 0:
            continue
        at = torch.arange(length, device=q.device)
        block, offset = block_tables[row][at // size].long(), at % size
        k, v = cache.key[block, offset].float(), cache.value[block, offset].float()  # [length, kv_heads, head_dim]
        if cache.key_affine is not None and cache.value_affine is not None:
            k = dequantize_kv(k, cache.key_affine[block, offset], torch.float32)
            v = dequantize_kv(v, cache.value_affine[block, offset], torch.float32)
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        weights = (torch.einsum("hd,thd->ht", q[row].float(), k) * scale).softmax(-1)
        out[row] = torch.einsum("ht,thd->hd", weights, v).to(q.dtype)
    return out.flatten(1)


def num_splits(batch: int, kv_heads: int, device: torch.device) -> int:
    """Parts that each sequence is cut into: enough programs to keep every core of the card reading."""
    cores = 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
    wanted = max(1, _PROGRAMS_PER_CORE * cores // (batch * kv_heads))
    return min(_MAX_SPLITS, 1 << (wanted.bit_length() - 1))


def decode_attention(
    q: torch.Tensor,
    cache: LayerCache,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
    splits: int | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """`decode_attention_reference` in one or two kernels. q is contiguous; head_dim is a power of two."""
    return _run(q, q.shape[1], None, cache, block_tables, context_lens, scale, out, splits, config)


@dataclass(frozen=True)
class NewTokens:
    """What `decode_step_attention` must know of the step's own tokens, one for each sequence; see `rotary_cache`."""

    cos: torch.Tensor  # float32 [B, 1, head_dim]
    sin: torch.Tensor
    query_scale: torch.Tensor | None  # [B, 1, 1]
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    eps: float
    slots: torch.Tensor  # int64 [B], -1 in padding rows
    key_centre: torch.Tensor | None = None  # [kv_heads, head_dim] of q's dtype, taken from rotated keys
    arrived: torch.Tensor | None = None  # of `arrival_counters`, used by one stream at a time


def decode_step_attention(
    qkv: torch.Tensor,
    new: NewTokens,
    cache: LayerCache,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
    splits: int | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """`rotary_cache`, then `decode_attention`, without a kernel of its own for the first.

    qkv [B, heads + 2 kv_heads, head_dim] as projected. The part of a sequence that ends in the new token takes its key
    and value from qkv and writes them to the cache; the tokens before are read while qkv is still being computed.
    """
    heads = qkv.shape[1] - 2 * cache.key.shape[2]
    return _run(qkv, heads, new, cache, block_tables, context_lens, scale, out, splits, config)


def _run(
    q: torch.Tensor,
    heads: int,
    new: NewTokens | None,
    cache: LayerCache,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor | None,
    splits: int | None,
    config: dict[str, int] | None,
) -> torch.Tensor:
    batch, head_dim = q.shape[0], q.shape[-1]
    kv_heads, size = cache.key.shape[2], cache.key.element_size()
    if config is None and heads == kv_heads:
        config = tuned("decode_heads", (size, head_dim, batch * heads))
    elif config is None:
        config = tuned("decode_attention", (size, head_dim, heads // kv_heads, batch))
    splits = splits or config.get("splits") or num_splits(batch, kv_heads, q.device)
    if out is None:
        out = torch.empty(batch, heads * head_dim, dtype=q.dtype, device=q.device)
    vector = _vector(size, head_dim)
    lanes = triton.next_power_of_2(head_dim // vector)
    tokens = max(1, 32 * config["warps"] // lanes)  # that the threads of a program read at once, where heads are alone
    parts = min(config["warps"], tokens) if heads == kv_heads and splits > 1 else 1  # that a program stores
    partial, lse = out, out
    if splits > 1:
        partial = torch.empty(batch, heads, splits * parts, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(batch, heads, splits * parts, dtype=torch.float32, device=q.device)
    q_norm, k_norm = (new.head_norms if new else None) or (None, None)
    operands = (
        q, new and new.cos, new and new.sin, new and new.query_scale, q_norm, k_norm, new and new.slots,
        new and new.key_centre,
    )  # fmt: skip
    quantized = cache.key_affine is not None
    shared: dict[str, Any] = dict(
        FUSED=new is not None, HAS_SCALE=new is not None and new.query_scale is not None, HAS_NORM=q_norm is not None,
        HAS_CENTRE=new is not None and new.key_centre is not None, SPLITS=splits, DIM=head_dim, HEADS=heads,
        BLOCK_SIZE=cache.key.shape[1], QUANTIZED=quantized, num_warps=config["warps"], **options(q),
    )  # fmt: skip
    scale, eps, stride = scale * 1.4426950408889634, new.eps if new else 0.0, block_tables.stride(0)
    grid = (splits, kv_heads, batch)
    if heads == kv_heads:
        arrived = None  # where nothing is split, given or not: it is one kernel
        if splits > 1:
            arrived = new.arrived if new else None
            arrived = arrival_counters(batch * heads, q.device) if arrived is None else arrived
        key, value, key_affine, value_affine = cache.key, cache.value, None, None
        if cache.key_affine is not None and cache.value_affine is not None:  # words of codes; scale and zero as one
            key, value = key.view(torch.int32), value.view(torch.int32)
            key_affine, value_affine = cache.key_affine.view(torch.int64), cache.value_affine.view(torch.int64)
        _attend_heads[grid](
            *operands, key, value, key_affine, value_affine, block_tables, context_lens, partial, lse, arrived, out,
            scale, eps, stride, 0,
            PARTS=parts, ROUNDS=max(1, config["tokens"] // tokens), TOKENS=tokens, LANES=lanes, VECTOR=vector,
            PIECE=min(8, vector), INTERPRETED=INTERPRETED, **shared,
        )  # fmt: skip
        return out
    group = heads // kv_heads
    tile = {"TILE": config["tokens"], "GROUP": group, "GROUP_TILE": max(16, triton.next_power_of_2(group))}
    shared |= {"KV_HEADS": kv_heads, **tile}
    stored = (cache.key, cache.value, cache.key_affine, cache.value_affine)
    sequences = (block_tables, context_lens, partial, lse, scale, eps, stride)
    if cache.key_affine is not None and cache.value_affine is not None and has_codes(q.dtype, head_dim):
        del shared["QUANTIZED"]
        words = (
            cache.key.view(torch.int32), cache.value.view(torch.int32),
            cache.key_affine.view(torch.int64), cache.value_affine.view(torch.int64),
        )  # fmt: skip
        _attend_codes[grid](*operands, *stored, *words, *sequences, INTERPRETED=INTERPRETED, **shared)
    else:
        _attend_groups[grid](*operands, *stored, *sequences, **shared)
    if splits > 1:
        _merge[(heads, batch)](
            partial, lse, context_lens, out, SPLITS=splits, TILE=config["tokens"], DIM=head_dim,
            LANES=triton.next_power_of_2(head_dim), HEADS=heads, num_warps=4, **options(q),
        )  # fmt: skip
    return out


def _vector(size: int, head_dim: int) -> int:
    """Numbers that a thread reads of a token: 16 bytes of them where head_dim is a multiple of that."""
    return math.gcd(16 // size, head_dim)


def arrival_counters(heads: int, device: torch.device) -> torch.Tensor:
    """Where the parts of each head of each sequence count themselves: all zero before and after the kernel."""
    return torch.zeros(heads * ARRIVED_STRIDE.value, dtype=torch.int32, device=device)


@triton.jit
def _tile(
    key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, block, token, stop, kv_head,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIM: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """Keys and values [TILE, DIM] of some tokens, and their scales and zeros (without meaning if not quantized)."""
    here = token < stop
    vector = (block.to(tl.int64) * BLOCK_SIZE + token % BLOCK_SIZE) * KV_HEADS + kv_head
    at = vector[:, None] * DIM + tl.arange(0, DIM)[None, :]
    k = tl.load(key_ptr + at, mask=here[:, None], other=0.0)
    v = tl.load(value_ptr + at, mask=here[:, None], other=0.0)
    if QUANTIZED:
        key_scale = tl.load(key_affine_ptr + vector * 2, mask=here, other=0.0)
        key_zero = tl.load(key_affine_ptr + vector * 2 + 1, mask=here, other=0.0)
        value_scale = tl.load(value_affine_ptr + vector * 2, mask=here, other=0.0)
        value_zero = tl.load(value_affine_ptr + vector * 2 + 1, mask=here, other=0.0)
    else:
        key_scale = tl.zeros_like(token).to(tl.float32)
        key_zero, value_scale, value_zero = key_scale, key_scale, key_scale
    return k, v, key_scale, key_zero, value_scale, value_zero


@triton.jit
def _attend_groups(
    q_ptr, cos_ptr, sin_ptr, query_scale_ptr, q_norm_ptr, k_norm_ptr, slots_ptr, centre_ptr,
    key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, table_ptr, context_ptr, partial_ptr, lse_ptr,
    scale, eps, table_stride,
    FUSED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_CENTRE: tl.constexpr,
    SPLITS: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    QUANTIZED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if not FUSED:
        start_after_previous(OVERLAP)
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    d = tl.arange(0, DIM)[None, :]
    context = tl.load(context_ptr + row).to(tl.int32)
    length = split_length(context, SPLITS, TILE)
    start = split * length
    past = context - 1 if FUSED else context  # tokens to read from the cache
    stop = tl.minimum(start + length, past)
    table_ptr += row * table_stride
    lane = tl.arange(0, TILE)
    block = blocks_of(table_ptr, start + lane, stop, BLOCK_SIZE)
    k, v, key_scale, key_zero, value_scale, value_zero = _tile(
        key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, block, start + lane, stop, kv_head,
        KV_HEADS, BLOCK_SIZE, DIM, QUANTIZED,
    )  # fmt: skip
    block = blocks_of(table_ptr, start + TILE + lane, stop, BLOCK_SIZE)
    cos, sin = 0.0, 0.0
    if FUSED:
        cos, sin = tl.load(cos_ptr + row * DIM + d), tl.load(sin_ptr + row * DIM + d)
        start_after_previous(OVERLAP)
    if start < context or SPLITS == 1:
        q, top, mine, new_v = group_query(
            q_ptr, query_scale_ptr, q_norm_ptr, k_norm_ptr, slots_ptr, centre_ptr,
            key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, cos, sin, eps, scale, row, kv_head,
            (past >= start) & (past < start + length),
            FUSED, HAS_SCALE, HAS_NORM, HAS_CENTRE, DIM, HEADS, KV_HEADS, GROUP, GROUP_TILE, QUANTIZED,
        )  # fmt: skip
        total = tl.zeros([GROUP_TILE], tl.float32) + mine
        acc = tl.zeros([GROUP_TILE, DIM], tl.float32) + mine * new_v
        q_dot = q.to(q_ptr.dtype.element_ty)
        for first in range(start, stop, TILE):
            token = first + lane
            here = token < stop
            next_tile = _tile(
                key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, block, token + TILE, stop, kv_head,
                KV_HEADS, BLOCK_SIZE, DIM, QUANTIZED,
            )  # fmt: skip
            block = blocks_of(table_ptr, token + 2 * TILE, stop, BLOCK_SIZE)
            dtype = q_ptr.dtype.element_ty
            if QUANTIZED:
                k_dot = ((k.to(tl.float32) - key_zero[:, None]) * key_scale[:, None]).to(dtype)
                v_dot = ((v.to(tl.float32) - value_zero[:, None]) * value_scale[:, None]).to(dtype)
            else:
                k_dot, v_dot = k.to(dtype), v.to(dtype)
            points = tl.dot(q_dot, tl.trans(k_dot), input_precision="ieee") * scale
            points = tl.where(here[None, :], points, -1e30)
            new_top = tl.maximum(top, tl.max(points, axis=1))
            shrink = tl.exp2(top - new_top)
            p = tl.exp2(points - new_top[:, None])
            total = total * shrink + tl.sum(p, axis=1)
            acc = tl.dot(p.to(dtype), v_dot, acc * shrink[:, None], input_precision="ieee")
            top = new_top
            k, v, key_scale, key_zero, value_scale, value_zero = next_tile
        member = tl.arange(0, GROUP_TILE)
        place = (row * HEADS + kv_head * GROUP + member) * SPLITS + split
        result = acc / tl.maximum(total, 1e-30)[:, None]
        lse = top + tl.log2(total)
        out = partial_ptr + place.to(tl.int64)[:, None] * DIM + d
        tl.store(out, result.to(partial_ptr.dtype.element_ty), mask=(member < GROUP)[:, None] & (d < DIM))
        if SPLITS > 1:
            tl.store(lse_ptr + place, lse, mask=member < GROUP)


@triton.jit
def _merge(
    partial_ptr, lse_ptr, context_ptr, out_ptr,
    SPLITS: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, LANES: tl.constexpr, HEADS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1)
    context = tl.load(context_ptr + row).to(tl.int32)
    used = tl.cdiv(context, tl.maximum(split_length(context, SPLITS, TILE), 1))
    start_after_previous(OVERLAP)
    merge_parts(partial_ptr, lse_ptr, out_ptr, row * HEADS + head, used, SPLITS, DIM, LANES)
