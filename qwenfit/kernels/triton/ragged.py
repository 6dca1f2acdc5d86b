"""Attention of a step that has prompts in it, on a GPU: flash attention for prompts, the split kernel for the rest."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from qwenfit.kernels.attention import LayerCache, RaggedStep
from qwenfit.kernels.kv_quant import dequantize_kv, quantize_kv
from qwenfit.kernels.triton.decode_attention import decode_attention


def ragged_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, step: RaggedStep, scale: float
) -> torch.Tensor:
    """Write k and v [T, kv_heads, head_dim] to the cache, then attend: q [T, heads, head_dim] -> [T, heads * head_dim].

    As `write_kv` and `paged_attention`, which are its reference; the host waits for nothing. A prompt that starts here
    attends to its own k and v, as the cache keeps them; one that goes on to its context, copied from the cache.
    """
    k, v = _write(cache.key, cache.key_affine, k, step), _write(cache.value, cache.value_affine, v, step)
    out = torch.empty(len(q), q.shape[1] * q.shape[2], dtype=q.dtype, device=q.device)
    starts = [0, *accumulate(step.query_lens)]
    single = [i for i, queries in enumerate(step.query_lens) if queries == 1]
    for i, (queries, context) in enumerate(zip(step.query_lens, step.context_lens, strict=True)):
        rows = slice(starts[i], starts[i + 1])
        if queries == 1:
            continue
        keys, values = k[rows], v[rows]
        if queries < context:
            blocks = step.block_tables[i, : -(-context // step.block_size)].long()
            keys = _read(cache.key, cache.key_affine, blocks, context, q.dtype)
            values = _read(cache.value, cache.value_affine, blocks, context, q.dtype)
        out[rows] = _flash(q[rows], keys, values, scale)
    if single:
        rows_of_single = torch.tensor([starts[i] for i in single]).to(q.device, non_blocking=True)
        contexts = torch.tensor([step.context_lens[i] for i in single]).to(q.device, non_blocking=True)
        tables = step.block_tables[torch.tensor(single).to(q.device, non_blocking=True)]
        out[rows_of_single] = decode_attention(q[rows_of_single], cache, tables, contexts, scale)
    return out


def _write(stored: torch.Tensor, affine: torch.Tensor | None, x: torch.Tensor, step: RaggedStep) -> torch.Tensor:
    """Store x in the step's slots; returns it as the cache will give it back."""
    if affine is None:
        stored.flatten(0, 1)[step.slots] = x.to(stored.dtype)
        return x
    q, scale_zero = quantize_kv(x)
    stored.flatten(0, 1)[step.slots] = q
    affine.flatten(0, 1)[step.slots] = scale_zero
    return dequantize_kv(q, scale_zero, x.dtype)


def _read(
    stored: torch.Tensor, affine: torch.Tensor | None, blocks: torch.Tensor, context: int, dtype: torch.dtype
) -> torch.Tensor:
    x = stored[blocks].flatten(0, 1)[:context]
    if affine is None:
        return x.to(dtype)
    return dequantize_kv(x, affine[blocks].flatten(0, 1)[:context], dtype)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """The last rows of a causal square: q [queries, heads, head_dim], k and v [context, kv_heads, head_dim]."""
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    if q.shape[2] == k.shape[2]:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        mask = causal_lower_right(q.shape[2], k.shape[2])
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out[0].transpose(0, 1).flatten(1)
