"""Attention of one query for each sequence over the paged cache, the sequences split into parts (Flash-Decoding).

`decode_attention_reference` is the definition. Shapes and lengths that change from step to step are read from device
tensors and the grid depends on none of them, so a CUDA graph of a step stays right as the sequences grow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenfit.kernels.attention import LayerCache
from qwenfit.kernels.kv_quant import dequantize_kv
from qwenfit.kernels.triton.launch import INTERPRETED, options, start_after_previous
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
    return min(_MAX_SPLITS, 1 << (wanted - 1).bit_length())


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
    batch, heads, head_dim = q.shape
    size, kv_heads = cache.key.shape[1:3]
    quantized = cache.key_affine is not None
    splits = splits or num_splits(batch, kv_heads, q.device)
    if out is None:
        out = torch.empty(batch, heads * head_dim, dtype=q.dtype, device=q.device)
    partial, lse = out, out
    if splits > 1:
        partial = torch.empty(batch, heads, splits, head_dim, dtype=torch.float32, device=q.device)
        lse = torch.empty(batch, heads, splits, dtype=torch.float32, device=q.device)
    group = heads // kv_heads
    config = config or tuned("decode_attention", (cache.key.element_size(), head_dim, group, batch))
    shared = dict(SPLITS=splits, DIM=head_dim, HEADS=heads, TILE=config["tokens"], **options(q))
    _attend[(splits, kv_heads, batch)](
        q, cache.key, cache.value, cache.key_affine, cache.value_affine, block_tables, context_lens, partial, lse,
        scale * 1.4426950408889634, block_tables.stride(0),
        KV_HEADS=kv_heads, GROUP=group, GROUP_TILE=max(16, triton.next_power_of_2(group)),
        BLOCK_SIZE=size, QUANTIZED=quantized, num_warps=config["warps"], **shared,
    )  # fmt: skip
    if splits > 1:
        _merge[(heads, batch)](partial, lse, context_lens, out, num_warps=4, **shared)
    return out


@triton.jit
def _split_length(context, SPLITS: tl.constexpr, TILE: tl.constexpr):
    return tl.cdiv(tl.cdiv(context, SPLITS), TILE) * TILE


@triton.jit
def _attend(
    q_ptr, key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, table_ptr, context_ptr, partial_ptr, lse_ptr,
    scale, table_stride,
    SPLITS: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    QUANTIZED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    split, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    context = tl.load(context_ptr + row).to(tl.int32)
    length = _split_length(context, SPLITS, TILE)
    start = split * length
    stop = tl.minimum(start + length, context)
    if start < stop or SPLITS == 1:
        if GROUP == 1:
            _attend_alone(
                q_ptr, key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, table_ptr + row * table_stride,
                partial_ptr, lse_ptr, row, kv_head, split, start, stop, scale,
                SPLITS, DIM, HEADS, TILE, KV_HEADS, BLOCK_SIZE, QUANTIZED,
            )  # fmt: skip
        else:
            _attend_group(
                q_ptr, key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, table_ptr + row * table_stride,
                partial_ptr, lse_ptr, row, kv_head, split, start, stop, scale,
                SPLITS, DIM, HEADS, TILE, KV_HEADS, GROUP, GROUP_TILE, BLOCK_SIZE, QUANTIZED,
            )  # fmt: skip


@triton.jit
def _vectors(table_ptr, token, stop, kv_head, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Which key and value vectors of the layer belong to tokens of a sequence."""
    block = tl.load(table_ptr + token // BLOCK_SIZE, mask=token < stop, other=0).to(tl.int64)
    return (block * BLOCK_SIZE + token % BLOCK_SIZE) * KV_HEADS + kv_head


@triton.jit
def _attend_alone(
    q_ptr, key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, table_ptr, partial_ptr, lse_ptr,
    row, head, split, start, stop, scale,
    SPLITS: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, KV_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """A query head with its own keys: no matrix product, so no tensor cores.

    Each of the TILE lanes keeps its own running maximum over the tokens that it meets; they are merged once at the end.
    """
    d = tl.arange(0, DIM)[None, :]
    lane = tl.arange(0, TILE)
    q = tl.load(q_ptr + (row * HEADS + head) * DIM + d).to(tl.float32) * scale
    q_sum = tl.sum(q)
    top = tl.full([TILE], -1e30, tl.float32)
    total = tl.zeros([TILE], tl.float32)
    offset = tl.zeros([TILE], tl.float32)  # what the zeros of quantized values take away
    acc = tl.zeros([TILE, DIM], tl.float32)
    vector = _vectors(table_ptr, start + lane, stop, head, KV_HEADS, BLOCK_SIZE)
    for first in range(start, stop, TILE):
        token = first + lane
        here = token < stop
        at = vector[:, None] * DIM + d
        k = tl.load(key_ptr + at, mask=here[:, None], other=0.0)
        v = tl.load(value_ptr + at, mask=here[:, None], other=0.0)
        if QUANTIZED:
            key_scale = tl.load(key_affine_ptr + vector * 2, mask=here, other=0.0)
            key_zero = tl.load(key_affine_ptr + vector * 2 + 1, mask=here, other=0.0)
            value_scale = tl.load(value_affine_ptr + vector * 2, mask=here, other=0.0)
            value_zero = tl.load(value_affine_ptr + vector * 2 + 1, mask=here, other=0.0)
        vector = _vectors(table_ptr, token + TILE, stop, head, KV_HEADS, BLOCK_SIZE)
        score = tl.sum(q * k.to(tl.float32), axis=1)
        if QUANTIZED:
            score = key_scale * (score - key_zero * q_sum)
        score = tl.where(here, score, -1e30)
        new_top = tl.maximum(top, score)
        shrink = tl.exp2(top - new_top)
        p = tl.where(here, tl.exp2(score - new_top), 0.0)
        total = total * shrink + p
        if QUANTIZED:
            p = p * value_scale
            offset = offset * shrink + p * value_zero
        acc = acc * shrink[:, None] + p[:, None] * v.to(tl.float32)
        top = new_top
    highest = tl.max(top, axis=0)
    weight = tl.exp2(top - highest)
    sum_p = tl.sum(total * weight, axis=0)
    sum_offset = tl.sum(offset * weight, axis=0)
    result = (tl.sum(acc * weight[:, None], axis=0) - sum_offset) / tl.maximum(sum_p, 1e-30)
    place = (row * HEADS + head) * SPLITS + split
    tl.store(partial_ptr + place.to(tl.int64) * DIM + tl.arange(0, DIM), result.to(partial_ptr.dtype.element_ty))
    if SPLITS > 1:
        tl.store(lse_ptr + place, highest + tl.log2(sum_p))


@triton.jit
def _attend_group(
    q_ptr, key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, table_ptr, partial_ptr, lse_ptr,
    row, kv_head, split, start, stop, scale,
    SPLITS: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, GROUP_TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr, QUANTIZED: tl.constexpr,
):  # fmt: skip
    """The query heads that share a kv head, padded to the 16 rows of a tensor core."""
    dtype = q_ptr.dtype.element_ty
    d = tl.arange(0, DIM)[None, :]
    lane = tl.arange(0, TILE)
    member = tl.arange(0, GROUP_TILE)
    head = kv_head * GROUP + member
    q = tl.load(q_ptr + (row * HEADS + head)[:, None] * DIM + d, mask=(member < GROUP)[:, None], other=0.0)
    top = tl.full([GROUP_TILE], -1e30, tl.float32)
    total = tl.zeros([GROUP_TILE], tl.float32)
    acc = tl.zeros([GROUP_TILE, DIM], tl.float32)
    for first in range(start, stop, TILE):
        token = first + lane
        here = token < stop
        vector = _vectors(table_ptr, token, stop, kv_head, KV_HEADS, BLOCK_SIZE)
        at = vector[:, None] * DIM + d
        k = tl.load(key_ptr + at, mask=here[:, None], other=0.0)
        v = tl.load(value_ptr + at, mask=here[:, None], other=0.0)
        if QUANTIZED:
            key_scale = tl.load(key_affine_ptr + vector * 2, mask=here, other=0.0)[:, None]
            key_zero = tl.load(key_affine_ptr + vector * 2 + 1, mask=here, other=0.0)[:, None]
            value_scale = tl.load(value_affine_ptr + vector * 2, mask=here, other=0.0)[:, None]
            value_zero = tl.load(value_affine_ptr + vector * 2 + 1, mask=here, other=0.0)[:, None]
            k = (k.to(tl.float32) - key_zero) * key_scale
            v = (v.to(tl.float32) - value_zero) * value_scale
        score = tl.dot(q, tl.trans(k.to(dtype)), input_precision="ieee") * scale
        score = tl.where(here[None, :], score, -1e30)
        new_top = tl.maximum(top, tl.max(score, axis=1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(score - new_top[:, None])
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(dtype), v.to(dtype), acc * shrink[:, None], input_precision="ieee")
        top = new_top
    result = acc / tl.maximum(total, 1e-30)[:, None]
    place = ((row * HEADS + head) * SPLITS + split)[:, None]
    real = (member < GROUP)[:, None]
    tl.store(partial_ptr + place.to(tl.int64) * DIM + d, result.to(partial_ptr.dtype.element_ty), mask=real)
    if SPLITS > 1:
        tl.store(lse_ptr + place, (top + tl.log2(total))[:, None], mask=real)


@triton.jit
def _merge(
    partial_ptr, lse_ptr, context_ptr, out_ptr,
    SPLITS: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    head, row = tl.program_id(0), tl.program_id(1)
    context = tl.load(context_ptr + row).to(tl.int32)
    split = tl.arange(0, SPLITS)
    used = split * _split_length(context, SPLITS, TILE) < context
    place = (row * HEADS + head) * SPLITS + split
    lse = tl.load(lse_ptr + place, mask=used, other=-1e30)
    weight = tl.where(used, tl.exp2(lse - tl.max(lse, axis=0)), 0.0)
    d = tl.arange(0, DIM)[None, :]
    partial = tl.load(partial_ptr + place.to(tl.int64)[:, None] * DIM + d, mask=used[:, None], other=0.0)
    result = tl.sum(partial * weight[:, None], axis=0) / tl.maximum(tl.sum(weight, axis=0), 1e-30)
    tl.store(out_ptr + (row * HEADS + head) * DIM + tl.arange(0, DIM), result.to(out_ptr.dtype.element_ty))
