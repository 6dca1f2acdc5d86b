"""Attention of one query for each sequence over the paged cache, the sequences in parts (Flash-Decoding).

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
from qwenfit.kernels.triton.decode_heads import _attend_heads
from qwenfit.kernels.triton.launch import INTERPRETED, options, start_after_previous
from qwenfit.kernels.triton.new_token import group_query
from qwenfit.kernels.triton.paged import blocks_of
from qwenfit.kernels.triton.parts import arrival_counters, cut, merge, part_of
from qwenfit.kernels.triton.tuning import tuned

# Sequences of a step whose attention may begin beside the kernel before it: with more, what is asked for early saves
# less than a first-level cache that products in shared memory leave small costs.
BESIDE, BESIDE_QUANTIZED = 7, 3


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


@dataclass(frozen=True)
class Parts:
    """How the attention of a step, in every layer, takes its contexts."""

    config: dict[str, int]
    wanted: int  # that one sequence has at most
    stored: int  # by a program, of its one
    table: torch.Tensor | None  # of `cut`; None: one sequence

    # Every layer writes to these, so they are for one stream at a time.
    arrived: torch.Tensor | None  # of `arrival_counters`; None: heads share keys
    results: tuple[torch.Tensor, torch.Tensor] | None  # `partial` and `lse` as `merge` takes them; None: one part


def contexts_in_parts(
    context_lens: torch.Tensor,
    heads: int,
    cache: LayerCache,
    arrived: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
    splits: int | None = None,
) -> Parts:
    """The parts of contexts [B] for attention by `config`, some `splits` of a sequence or as many as the card has room
    for. arrived: counters, if there are any already.
    """
    batch, device, (kv_heads, head_dim) = len(context_lens), context_lens.device, cache.key.shape[2:]
    config = config or _config(heads, cache, batch)
    wanted = splits * batch if splits else _wanted(config, batch, heads, cache)
    stored = 1
    if heads == kv_heads and wanted >= 2 * batch:
        stored = min(config["warps"], _tokens_at_once(config, cache))
    if arrived is None and heads == kv_heads:
        arrived = arrival_counters(batch * heads, device)
    table = None if batch == 1 else cut(context_lens, wanted, config["tokens"])
    results, count = None, (wanted + batch - 1) * stored
    if count > 1:
        partial = torch.empty(heads, count, head_dim, dtype=torch.float32, device=device)
        results = partial, torch.empty(heads, count, dtype=torch.float32, device=device)
    return Parts(config, wanted, stored, table, arrived, results)


def _config(heads: int, cache: LayerCache, batch: int) -> dict[str, int]:
    kv_heads, head_dim = cache.key.shape[2:]
    size = cache.key.element_size()
    if heads == kv_heads:
        return tuned("decode_heads", (size, head_dim, batch * heads))
    return tuned("decode_attention", (size, head_dim, heads // kv_heads, batch))


def _wanted(config: dict[str, int], batch: int, heads: int, cache: LayerCache) -> int:
    """Parts of all sequences together: enough programs to keep every core of the card reading, and no more at once."""
    if batch == 1 and "splits" in config:
        return config["splits"]
    cores = 4 if INTERPRETED else torch.cuda.get_device_properties(cache.key.device).multi_processor_count
    warps = 16 if heads == cache.key.shape[2] and cache.key_affine is None else 8  # that have room on a core at once
    programs = cores * warps // config["warps"]
    return 1 << (max(1, programs // cache.key.shape[2]).bit_length() - 1)


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
    """`decode_attention_reference` in up to three kernels. q is contiguous.

    head_dim is a power of two where heads share keys.
    """
    return _run(q, q.shape[1], None, cache, block_tables, context_lens, scale, out, splits, config, None)


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
    parts: Parts | None = None,
) -> torch.Tensor:
    """`rotary_cache`, then `decode_attention`, without a kernel of its own for the first.

    qkv [B, heads + 2 kv_heads, head_dim] as projected. The part of a sequence that ends in the new token takes its key
    and value from qkv and writes them to the cache; the tokens before are read while qkv is still being computed.
    parts: of `contexts_in_parts`, which is not to be the last thing before this; in place of splits and config.
    """
    heads = qkv.shape[1] - 2 * cache.key.shape[2]
    return _run(qkv, heads, new, cache, block_tables, context_lens, scale, out, splits, config, parts)


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
    parts: Parts | None,
) -> torch.Tensor:
    batch, head_dim = q.shape[0], q.shape[-1]
    kv_heads = cache.key.shape[2]
    quantized = cache.key_affine is not None
    launch = options(q, beside=parts is not None and batch <= (BESIDE_QUANTIZED if quantized else BESIDE))
    if parts is None:  # it begins by reading what was just written
        parts = contexts_in_parts(context_lens, heads, cache, None, config, splits)
    config, table, wanted = parts.config, parts.table, parts.wanted
    count = wanted if table is None else len(table)
    if out is None:
        out = torch.empty(batch, heads * head_dim, dtype=q.dtype, device=q.device)
    partial, lse = parts.results or (out, out)
    q_norm, k_norm = (new.head_norms if new else None) or (None, None)
    operands = (
        q, new and new.cos, new and new.sin, new and new.query_scale, q_norm, k_norm, new and new.slots,
        new and new.key_centre,
    )  # fmt: skip
    shared: dict[str, Any] = dict(
        FUSED=new is not None, HAS_SCALE=new is not None and new.query_scale is not None, HAS_NORM=q_norm is not None,
        HAS_CENTRE=new is not None and new.key_centre is not None, CUT=table is not None,
        SPLITS=count if table is None else 0, DIM=head_dim, HEADS=heads, BLOCK_SIZE=cache.key.shape[1],
        QUANTIZED=quantized, num_warps=config["warps"], **launch,
    )  # fmt: skip
    numbers = (scale * 1.4426950408889634, new.eps if new else 0.0, block_tables.stride(0), count)
    contexts = (block_tables, context_lens, table, partial, lse)
    grid = (kv_heads, count)
    words: tuple[torch.Tensor, ...] | None = None
    if cache.key_affine is not None and cache.value_affine is not None:  # four codes each; scale and zero as one
        words = (
            cache.key.view(torch.int32), cache.value.view(torch.int32),
            cache.key_affine.view(torch.int64), cache.value_affine.view(torch.int64),
        )  # fmt: skip
    if heads == kv_heads:
        if "registers" in config and not INTERPRETED:
            shared["maxnreg"] = config["registers"]
        tokens, vector = _tokens_at_once(config, cache), _vector(cache)
        _attend_heads[grid](
            *operands, *(words or (cache.key, cache.value, None, None)), *contexts, parts.arrived, out, *numbers, 0,
            MOST=triton.next_power_of_2(wanted) * parts.stored, PARTS=parts.stored,
            ROUNDS=max(1, config["tokens"] // tokens), TOKENS=tokens, LANES=_lanes(cache), VECTOR=vector,
            PIECE=min(8, vector), INTERPRETED=INTERPRETED, **shared,
        )  # fmt: skip
        return out
    group = heads // kv_heads
    tile = max(16, triton.next_power_of_2(group))
    shared |= {"KV_HEADS": kv_heads, "TILE": config["tokens"], "GROUP": group, "GROUP_TILE": tile}
    stages = config.get("stages", 1)
    stored = (cache.key, cache.value, cache.key_affine, cache.value_affine)
    if words is not None and has_codes(q.dtype, head_dim):
        del shared["QUANTIZED"]
        _attend_codes[grid](
            *operands, *stored, *words, *contexts, out, *numbers, STAGES=stages, INTERPRETED=INTERPRETED, **shared
        )
    else:  # bytes made floats take the shared memory that more stages need
        _attend_groups[grid](*operands, *stored, *contexts, out, *numbers, STAGES=1 if quantized else stages, **shared)
    if parts.results is not None:
        merge(partial, lse, out, context_lens, table, wanted, config["tokens"])
    return out


def _vector(cache: LayerCache) -> int:
    """Numbers that a thread reads of a token: 16 bytes of them where head_dim is a multiple of that."""
    return math.gcd(16 // cache.key.element_size(), cache.key.shape[3])


def _lanes(cache: LayerCache) -> int:
    """Threads that read a token, where heads are alone."""
    return 1 << (cache.key.shape[3] // _vector(cache) - 1).bit_length()


def _tokens_at_once(config: dict[str, int], cache: LayerCache) -> int:
    """Tokens that the threads of a program read at once, where heads are alone."""
    return max(1, 32 * config["warps"] // _lanes(cache))


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
def _absorb(state, q, tile, here, scale, QUANTIZED: tl.constexpr):
    """Attend to one tile more. here [TILE]; state: the highest score, the sum of weights, and of weighted values."""
    top, total, acc = state
    k, v, key_scale, key_zero, value_scale, value_zero = tile
    if QUANTIZED:
        k = ((k.to(tl.float32) - key_zero[:, None]) * key_scale[:, None]).to(q.dtype)
        v = ((v.to(tl.float32) - value_zero[:, None]) * value_scale[:, None]).to(q.dtype)
    points = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee") * scale
    points = tl.where(here[None, :], points, -1e30)
    new_top = tl.maximum(top, tl.max(points, axis=1))
    shrink = tl.exp2(top - new_top)
    p = tl.exp2(points - new_top[:, None])
    total = total * shrink + tl.sum(p, axis=1)
    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * shrink[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit(do_not_specialize=["splits"])
def _attend_groups(
    q_ptr, cos_ptr, sin_ptr, query_scale_ptr, q_norm_ptr, k_norm_ptr, slots_ptr, centre_ptr,
    key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, table_ptr, context_ptr, parts_ptr,
    partial_ptr, lse_ptr, out_ptr, scale, eps, table_stride, splits,
    FUSED: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_CENTRE: tl.constexpr,
    CUT: tl.constexpr, SPLITS: tl.constexpr, DIM: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
    STAGES: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_TILE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, QUANTIZED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if not FUSED:
        start_after_previous(OVERLAP)
    d = tl.arange(0, DIM)[None, :]
    kv_head, part = tl.program_id(0), tl.program_id(1)
    row, start, stop, first_part, used = part_of(parts_ptr, context_ptr, part, SPLITS, TILE, CUT)
    owns = (part - first_part == used - 1) & (stop > start)  # the new token, which is not read from the cache
    if FUSED:
        stop -= owns.to(tl.int32)
    table_ptr += row * table_stride
    lane = tl.arange(0, TILE)
    if STAGES == 1:
        block = blocks_of(table_ptr, start + lane, stop, BLOCK_SIZE)
        tile = _tile(
            key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, block, start + lane, stop, kv_head,
            KV_HEADS, BLOCK_SIZE, DIM, QUANTIZED,
        )  # fmt: skip
        block = blocks_of(table_ptr, start + TILE + lane, stop, BLOCK_SIZE)
    cos, sin = 0.0, 0.0
    if FUSED:
        cos, sin = tl.load(cos_ptr + row * DIM + d), tl.load(sin_ptr + row * DIM + d)
        start_after_previous(OVERLAP)
    if part - first_part < used:
        q, top, mine, new_v = group_query(
            q_ptr, query_scale_ptr, q_norm_ptr, k_norm_ptr, slots_ptr, centre_ptr,
            key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, cos, sin, eps, scale, row, kv_head,
            owns,
            FUSED, HAS_SCALE, HAS_NORM, HAS_CENTRE, DIM, HEADS, KV_HEADS, GROUP, GROUP_TILE, QUANTIZED,
        )  # fmt: skip
        total = tl.zeros([GROUP_TILE], tl.float32) + mine
        acc = tl.zeros([GROUP_TILE, DIM], tl.float32) + mine * new_v
        q_dot = q.to(q_ptr.dtype.element_ty)
        state = (top, total, acc)
        if STAGES == 1:
            for first in range(start, stop, TILE):
                token = first + lane
                next_tile = _tile(
                    key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, block, token + TILE, stop, kv_head,
                    KV_HEADS, BLOCK_SIZE, DIM, QUANTIZED,
                )  # fmt: skip
                block = blocks_of(table_ptr, token + 2 * TILE, stop, BLOCK_SIZE)
                state = _absorb(state, q_dot, tile, token < stop, scale, QUANTIZED)
                tile = next_tile
        else:
            for first in tl.range(start, stop, TILE, num_stages=STAGES):
                token = first + lane
                tile = _tile(
                    key_ptr, value_ptr, key_affine_ptr, value_affine_ptr,
                    blocks_of(table_ptr, token, stop, BLOCK_SIZE), token, stop, kv_head,
                    KV_HEADS, BLOCK_SIZE, DIM, QUANTIZED,
                )  # fmt: skip
                state = _absorb(state, q_dot, tile, token < stop, scale, QUANTIZED)
        top, total, acc = state
        member = tl.arange(0, GROUP_TILE)
        real = (member < GROUP)[:, None] & (d < DIM)
        result = acc / tl.maximum(total, 1e-30)[:, None]
        head = kv_head * GROUP
        if used == 1:
            out = out_ptr + (row * HEADS + head + member).to(tl.int64)[:, None] * DIM + d
            tl.store(out, result.to(out_ptr.dtype.element_ty), mask=real)
        else:
            place = (head + member).to(tl.int64) * splits + part
            tl.store(partial_ptr + place[:, None] * DIM + d, result, mask=real)
            tl.store(lse_ptr + place, top + tl.log2(total), mask=member < GROUP)
