"""Causal attention over a paged KV cache, for a ragged step that mixes prompt chunks and decoding sequences.

`write_kv` puts a step's keys and values into their slots, `paged_attention` then lets each query see its own
sequence up to itself. `paged_attention_reference` says the same in the plainest way, as the oracle of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
import torch.nn.functional as F

from qwenfit.kernels import block
from qwenfit.kernels.kv_quant import dequantize_kv, quantize_kv, quantize_kv_qwen1


@dataclass(frozen=True)
class LayerCache:
    """One layer's share of the KV cache.

    Keys are cached after rotation. A slot is `block * block_size + offset`.
    """

    key: torch.Tensor  # [num_blocks, block_size, kv_heads, head_dim]
    value: torch.Tensor  # the same
    key_affine: torch.Tensor | None = None  # uint8 caches: float32 [num_blocks, block_size, kv_heads, 2]: scale, zero
    value_affine: torch.Tensor | None = None
    per_chunk: bool = False  # Qwen-1's own quantizer: one scale for each head of a chunk

    @cached_property
    def native(self) -> block.Cache | None:
        """The same for the C kernels; None where they do not serve it."""
        _, block_size, kv_heads, head_dim = self.key.shape
        if self.per_chunk or head_dim > block.MAX_HEAD_DIM:
            return None
        if self.key.device.type != "cpu" or self.key.dtype not in block.CACHE_DTYPES:
            return None
        return block.Cache(
            self.key.data_ptr(),
            self.value.data_ptr(),
            None if self.key_affine is None else self.key_affine.data_ptr(),
            None if self.value_affine is None else self.value_affine.data_ptr(),
            kv_heads,
            head_dim,
            block_size,
            block.CACHE_DTYPES[self.key.dtype],
        )


@dataclass(frozen=True)
class Span:
    """One sequence of a step: its query rows, and where its context lies in the cache."""

    start: int  # rows start..stop of the step are this sequence's queries
    stop: int
    context: int  # tokens cached for the sequence, this step's included
    first_slot: int  # where the context starts, when its blocks follow each other
    blocks: torch.Tensor | None  # int64 [blocks], when they do not
    mask: torch.Tensor | None  # [queries, context] added to the scores; None: no key is hidden
    causal: bool  # queries and context are the same tokens


@dataclass(frozen=True)
class RaggedStep:
    """What attention must know of one step; the same for every layer, so derived once."""

    query_lens: list[int]  # [sequences], sums to the T tokens of the step
    context_lens: list[int]  # [sequences], this step's tokens included
    block_tables: torch.Tensor  # int32 [sequences, max_blocks]
    slots: torch.Tensor  # int64 [T]
    block_size: int
    dtype: torch.dtype  # of the queries

    @cached_property
    def first_slot(self) -> int | None:
        """The slot of the first token, when the others follow in order; else None."""
        first, tokens = int(self.slots[0]), len(self.slots)
        if tokens == 1 or torch.equal(self.slots, torch.arange(first, first + tokens)):
            return first
        return None

    @cached_property
    def single(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """The sequences that bring one token: its row int64, their context int32, their block tables; None: none."""
        which = [i for i, queries in enumerate(self.query_lens) if queries == 1]
        if not which:
            return None
        contexts = torch.tensor([self.context_lens[i] for i in which], dtype=torch.int32)
        if len(which) == len(self.query_lens):
            return torch.arange(len(which)), contexts, self.block_tables
        starts = [0, *accumulate(self.query_lens)]
        return torch.tensor([starts[i] for i in which]), contexts, self.block_tables[which]

    @cached_property
    def chunks(self) -> list[Span]:
        """The sequences that bring more than one token."""
        if max(self.query_lens) == 1:
            return []
        return [span for span in self.spans if span.stop - span.start > 1]

    @cached_property
    def spans(self) -> list[Span]:
        spans, start = [], 0
        for queries, context, table in zip(self.query_lens, self.context_lens, self.block_tables.tolist(), strict=True):
            blocks = table[: -(-context // self.block_size)]
            scattered = any(b != blocks[0] + i for i, b in enumerate(blocks))
            mask = None
            if 1 < queries < context:
                hidden = torch.ones(queries, context, dtype=torch.bool).triu_(context - queries + 1)
                mask = torch.zeros(queries, context, dtype=self.dtype).masked_fill_(hidden, -torch.inf)
            spans.append(
                Span(
                    start=start,
                    stop=start + queries,
                    context=context,
                    first_slot=blocks[0] * self.block_size,
                    blocks=torch.tensor(blocks) if scattered else None,
                    mask=mask,
                    causal=1 < queries == context,
                )
            )
            start += queries
        return spans


def write_kv(cache: LayerCache, k: torch.Tensor, v: torch.Tensor, step: RaggedStep) -> None:
    """Store the step's keys and values [T, kv_heads, head_dim] in their slots, quantized if the cache is."""
    if cache.native is not None and block.usable(k):
        return block.write_kv(cache.native, k, v, step.slots)
    for stored, affine, x in ((cache.key, cache.key_affine, k), (cache.value, cache.value_affine, v)):
        if affine is not None:
            x, scale_zero = _quantize_chunks(x, step) if cache.per_chunk else quantize_kv(x)
            _put(affine, scale_zero, step)
        _put(stored, x, step)


def _put(stored: torch.Tensor, x: torch.Tensor, step: RaggedStep) -> None:
    flat = stored.flatten(0, 1)
    if step.first_slot is not None:
        flat[step.first_slot : step.first_slot + len(x)].copy_(x)
    else:
        flat.index_copy_(0, step.slots, x.to(flat.dtype))


def _quantize_chunks(x: torch.Tensor, step: RaggedStep) -> tuple[torch.Tensor, torch.Tensor]:
    """Qwen-1's quantizer on each sequence's rows of x [T, kv_heads, head_dim]."""
    q, affine = [], []
    for chunk in torch.split_with_sizes(x, step.query_lens):
        quantized, scale, zero = (t[0].transpose(0, 1) for t in quantize_kv_qwen1(chunk.transpose(0, 1)[None]))
        q.append(quantized)
        affine.append(torch.cat((scale, zero), dim=-1).float())
    return torch.cat(q), torch.cat(affine)


def paged_attention(q: torch.Tensor, cache: LayerCache, step: RaggedStep, scale: float) -> torch.Tensor:
    """softmax(scale * q k^T) v of each query over its sequence's cached tokens up to its own.

    q [T, heads, head_dim] -> [T, heads * head_dim]. Query head h reads kv head h // (heads / kv_heads).
    """
    if cache.native is not None and block.usable(q):
        out = q.new_empty(len(q), q.shape[1] * q.shape[2])
        if step.single is not None:
            block.decode_attention(cache.native, q, out, *step.single, scale)
        for span in step.chunks:
            rows = slice(span.start, span.stop)
            out[rows] = _attend(q[rows], *_read(cache, span, q.dtype), span, scale)
        return out
    outputs = [_attend(q[span.start : span.stop], *_read(cache, span, q.dtype), span, scale) for span in step.spans]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _read(cache: LayerCache, span: Span, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A sequence's keys and values [context, kv_heads, head_dim]; a view of the cache where no copy is needed."""
    key, value = _take(cache.key, span), _take(cache.value, span)
    if cache.key_affine is not None and cache.value_affine is not None:
        return (
            dequantize_kv(key, _take(cache.key_affine, span), dtype),
            dequantize_kv(value, _take(cache.value_affine, span), dtype),
        )
    return key.to(dtype), value.to(dtype)


def _take(stored: torch.Tensor, span: Span) -> torch.Tensor:
    if span.blocks is None:
        return stored.flatten(0, 1)[span.first_slot : span.first_slot + span.context]
    return stored.index_select(0, span.blocks).flatten(0, 1)[: span.context]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span, scale: float) -> torch.Tensor:
    tokens, heads, head_dim = q.shape
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]  # [1, kv_heads, context, head_dim]
    if tokens == 1:
        # The query heads that share a kv head are rows of one product: nothing is repeated.
        grouped = q.reshape(1, k.shape[1], -1, head_dim)
        return F.scaled_dot_product_attention(grouped, k, v, scale=scale).reshape(1, heads * head_dim)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, attn_mask=span.mask, is_causal=span.causal, scale=scale, enable_gqa=True
    )
    return out[0].transpose(0, 1).reshape(tokens, heads * head_dim)


def paged_attention_reference(q: torch.Tensor, cache: LayerCache, step: RaggedStep, scale: float) -> torch.Tensor:
    """The definition, one query and head at a time, in float32: slow, and the oracle of every faster version."""
    tokens, heads, head_dim = q.shape
    out = torch.empty(tokens, heads, head_dim, dtype=q.dtype)
    row = 0
    for table, queries, context in zip(step.block_tables, step.query_lens, step.context_lens, strict=True):
        for position in range(context - queries, context):
            seen = torch.arange(position + 1)
            block, offset = table[seen // step.block_size].long(), seen % step.block_size
            k, v = cache.key[block, offset].float(), cache.value[block, offset].float()
            if cache.key_affine is not None and cache.value_affine is not None:
                k = dequantize_kv(k, cache.key_affine[block, offset], torch.float32)
                v = dequantize_kv(v, cache.value_affine[block, offset], torch.float32)
            for head in range(heads):
                shared = head * k.shape[1] // heads
                weights = torch.softmax(k[:, shared] @ q[row, head].float() * scale, dim=0)
                out[row, head] = weights @ v[:, shared]
            row += 1
    return out.flatten(1)
