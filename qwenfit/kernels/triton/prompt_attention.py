"""Causal attention of prompts on the tensor cores: several at once, each on its own context.

`prompt_attention_reference` is the definition. The kernel is the forward pass of FlashAttention-2 (arXiv 2307.08691),
a program for some queries of one head; the longest rows start first, so that short ones fill the gaps at the end. The
grid depends on no length, so that a CUDA graph of a step serves other prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch.nn.functional import scaled_dot_product_attention

from qwenfit.kernels.hopper.attention import hopper_attention
from qwenfit.kernels.triton.launch import options, start_after_previous

Lens = list[int]


class Turn(NamedTuple):
    """What is still to be done to the queries: rotation, and LogN's factor."""

    cos: torch.Tensor  # float32 [rows of q, 1, head_dim]
    sin: torch.Tensor  # the same, the first half negated
    query_scale: torch.Tensor | None  # [rows of q, 1, 1] in the model's dtype


def prompt_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, query_lens: Lens, context_lens: Lens, scale: float
) -> torch.Tensor:
    """q [sum of queries, heads, head_dim], k and v [sum of contexts, kv_heads, head_dim] -> as q.

    A prompt's queries are the last of its context; each sees itself and what is before it.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    start = context_start = 0
    for queries, context in zip(query_lens, context_lens, strict=True):
        rows, keys = slice(start, start + queries), slice(context_start, context_start + context)
        mask = torch.ones(queries, context, dtype=torch.bool, device=q.device).tril_(context - queries)
        one, its_k, its_v = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))
        attended = scaled_dot_product_attention(one, its_k, its_v, attn_mask=mask, scale=scale, enable_gqa=True)
        out[rows] = attended[0].transpose(0, 1)
        start, context_start = rows.stop, keys.stop
    return out


def tiles_of(query_lens: Sequence[int], context_lens: Sequence[int], rows: int) -> list[tuple[int, int]]:
    """The programs of a head, `rows` queries each: (prompt, first query), those with most to read first."""
    tiles = [
        (context - queries + first, prompt, first)
        for prompt, (queries, context) in enumerate(zip(query_lens, context_lens, strict=True))
        for first in range(0, queries, rows)
    ]
    return [(prompt, first) for _, prompt, first in sorted(tiles, reverse=True)]


def prompt_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    context_starts: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    config: dict[str, int],
    turn: Turn | None = None,
    before: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """`prompt_attention_reference` in one kernel, from int32 [prompts + 1] of where each prompt's rows begin.

    tiles: int32 [programs, 2] of `tiles_of` for config["m"] queries each; a first query that the prompt does not have
    stands for none, one that q has no row for, for the end of the list. before: int32 [1], rows of q that come before
    the first prompt's; None: none. Rows of `out` that are no prompt's are left alone. Heads are contiguous and a power
    of two wide; tokens may be strided. With `turn` the queries are as they were projected, and each step on them is
    rounded to their dtype. A config with "hopper" is for the kernel in CUDA C++, and bfloat16.
    """
    cos, sin, query_scale = turn or (None, None, None)
    heads, head_dim = q.shape[1:]
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if "hopper" in config:
        return hopper_attention(q, k, v, query_starts, context_starts, tiles, scale, turn, before, out)
    _prompt_attention[(heads, len(tiles))](
        q, k, v, out, cos, sin, query_scale, query_starts, context_starts, tiles, before, q.stride(0), k.stride(0),
        v.stride(0), scale * 1.4426950408889634, HEADS=heads, GROUP=heads // k.shape[1], DIM=head_dim,
        TURNS=turn is not None, HAS_SCALE=query_scale is not None, HAS_BEFORE=before is not None,
        M=config["m"], N=config["n"], STAGES=config["stages"], num_warps=config["warps"], **options(q),
    )  # fmt: skip
    return out


@triton.jit
def _turned(
    q_ptr, cos_ptr, sin_ptr, query_scale_ptr, row, q_stride, begin, queries,
    DIM: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Queries [M, DIM] from their halves, rotated and scaled."""
    HALF: tl.constexpr = DIM // 2
    dtype = q_ptr.dtype.element_ty
    there, d = (row < queries)[:, None], tl.arange(0, HALF)[None, :]
    at = q_ptr + row[:, None] * q_stride + d
    a = tl.load(at, mask=there, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=there, other=0.0).to(tl.float32)
    angle = (begin + row).to(tl.int64)[:, None] * DIM + d
    cos = tl.load(cos_ptr + angle, mask=there, other=0.0)
    sin = tl.load(sin_ptr + HALF + angle, mask=there, other=0.0)
    turned_a, turned_b = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    if HAS_SCALE:
        factor = tl.load(query_scale_ptr + begin + row, mask=row < queries, other=0.0).to(tl.float32)[:, None]
        turned_a = (turned_a.to(tl.float32) * factor).to(dtype)
        turned_b = (turned_b.to(tl.float32) * factor).to(dtype)
    return tl.permute(tl.join(turned_a, turned_b), (0, 2, 1)).reshape([row.shape[0], DIM])


@triton.jit(
    do_not_specialize_on_alignment=[
        "query_scale_ptr", "query_starts_ptr", "context_starts_ptr", "tiles_ptr", "before_ptr",
    ]
)  # fmt: skip
def _prompt_attention(
    q_ptr, k_ptr, v_ptr, out_ptr, cos_ptr, sin_ptr, query_scale_ptr, query_starts_ptr, context_starts_ptr, tiles_ptr,
    before_ptr, q_stride, k_stride, v_stride, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, TURNS: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_BEFORE: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    head = tl.program_id(0)
    prompt, first = tl.load(tiles_ptr + 2 * tl.program_id(1)), tl.load(tiles_ptr + 2 * tl.program_id(1) + 1)
    begin, keys_begin = tl.load(query_starts_ptr + prompt), tl.load(context_starts_ptr + prompt)
    queries = tl.load(query_starts_ptr + prompt + 1) - begin
    context = tl.load(context_starts_ptr + prompt + 1) - keys_begin
    if HAS_BEFORE:
        begin += tl.load(before_ptr)
    if first < queries:
        row = first + tl.arange(0, M)
        d = tl.arange(0, DIM)
        column = tl.arange(0, N)
        before = context - queries  # tokens that are before the first query
        q_ptr += begin.to(tl.int64) * q_stride + head * DIM
        k_ptr += keys_begin.to(tl.int64) * k_stride + head // GROUP * DIM
        v_ptr += keys_begin.to(tl.int64) * v_stride + head // GROUP * DIM
        if TURNS:
            q = _turned(q_ptr, cos_ptr, sin_ptr, query_scale_ptr, row, q_stride, begin, queries, DIM, HAS_SCALE)
        else:
            q = tl.load(q_ptr + row[:, None] * q_stride + d[None, :], mask=(row < queries)[:, None], other=0.0)
        top = tl.full([M], -1e30, tl.float32)
        total = tl.zeros([M], tl.float32)
        acc = tl.zeros([M, DIM], tl.float32)
        whole = (first + before + 1) // N * N  # all queries of the program see the keys up to here
        for start in tl.range(0, whole, N, num_stages=STAGES):
            at = (start + column)[:, None]
            k = tl.load(k_ptr + at * k_stride + d[None, :])
            points = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            new_top = tl.maximum(top, tl.max(points, axis=1))
            p = tl.exp2(points - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, axis=1)
            v = tl.load(v_ptr + at * v_stride + d[None, :])
            acc = tl.dot(p.to(q.dtype), v, acc * shrink[:, None], input_precision="ieee")
            top = new_top
        for start in tl.range(whole, tl.minimum(context, first + M + before), N, num_stages=1):
            at = (start + column)[:, None]
            k = tl.load(k_ptr + at * k_stride + d[None, :], mask=at < context, other=0.0)
            points = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            points = tl.where((start + column)[None, :] <= (row + before)[:, None], points, -1e30)
            new_top = tl.maximum(top, tl.max(points, axis=1))
            p = tl.exp2(points - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(p, axis=1)
            v = tl.load(v_ptr + at * v_stride + d[None, :], mask=at < context, other=0.0)
            acc = tl.dot(p.to(q.dtype), v, acc * shrink[:, None], input_precision="ieee")
            top = new_top
        out = out_ptr + ((begin + row).to(tl.int64) * HEADS + head)[:, None] * DIM + d[None, :]
        result = acc / total[:, None]
        tl.store(out, result.to(out_ptr.dtype.element_ty), mask=(row < queries)[:, None])
