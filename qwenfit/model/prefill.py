"""A step with prompts in it, on a GPU: nine launches a layer, none of which waits for the host."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import embedding

from qwenfit.kernels.choice import INT_MATMUL_ROWS
from qwenfit.kernels.triton.fused_norm import add_norm
from qwenfit.kernels.triton.gate import silu_mul
from qwenfit.kernels.triton.int_matvec import BlockedWeight
from qwenfit.kernels.triton.product import product, takes_hopper
from qwenfit.kernels.triton.ragged import RaggedPlan, ragged_attention, ragged_plan
from qwenfit.kernels.wide import add_product
from qwenfit.model.attention import Attention
from qwenfit.model.batch import Batch
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.linear import Linear
from qwenfit.model.new_tokens import new_tokens
from qwenfit.model.rotary import Angles
from qwenfit.model.transformer import Block, RMSNorm, Transformer


@torch.inference_mode()
def prefill(model: Transformer, batch: Batch, cache: KVCache, rows: torch.Tensor | None = None) -> torch.Tensor:
    """Hidden states after the final norm, [T, hidden], or [len(rows), hidden] of the `rows` (int64) of T.

    The step's keys and values enter the cache. What the layers add up is float32: rounded after each, it would be a
    tenth of a short network's error, and more of a deep one's. The last layer computes no more than `rows` ask for.
    Sequences that bring one token are fastest at the beginning of the batch.
    """
    # LogN's scale is there even where it is 1: its kernels are those that the decoding step has compiled already.
    angles = model.rotary.angles(batch.positions, batch.query_lens, batch.ntk_alphas, math.inf, model.dtype)
    step = batch.step(cache.block_size, model.dtype)
    plan = ragged_plan(step, model.config.num_heads, cache.layers[0])
    return run_layers(model, batch.input_ids, batch.slots, angles, plan, cache, rows)


def run_layers(
    model: Transformer,
    input_ids: torch.Tensor,
    slots: torch.Tensor,
    angles: Angles,
    plan: RaggedPlan,
    cache: KVCache,
    rows: torch.Tensor | None,
    ends: bool = False,
) -> torch.Tensor:
    """`prefill` of tokens int64 [T] whose keys and values go to `slots` int64 [T]; -1: to none, a row of padding.

    ends: only the first and the last layer, where the kernels count and not the result; all, where others differ from
    these.
    """
    blocks = [layer for layer in model.layers if isinstance(layer, Block)]
    if ends and {*map(_kinds, blocks)} <= {_kinds(blocks[0]), _kinds(blocks[-1])}:
        blocks = [blocks[0], *blocks[1:][-1:]]
    x = embedding(input_ids, model.embed_tokens.weight).float()
    first = blocks[0].input_layernorm
    normed, x = add_norm(x, None, first.weight, first.eps)
    near = plan.singles > 0 or plan.context_slots is not None  # attention that takes long; see `product`
    for index, layer in enumerate(blocks):
        out = _attend(layer.self_attn, index, normed, angles, slots, cache, plan, near)
        last = index + 1 == len(blocks)
        if last and rows is not None:
            out, x = out[rows], x[rows]
            if len(rows) == 0:
                return x
        normed, x = _add_and_norm(layer.self_attn.o_proj, out, x, layer.post_attention_layernorm, near)
        inner = _multiplied(layer.mlp.gate_up_proj, normed, gated=True)
        normed, x = _add_and_norm(
            layer.mlp.down_proj, inner, x, model.norm if last else blocks[index + 1].input_layernorm
        )
    return normed


def _kinds(block: Block) -> tuple[object, ...]:
    """What the kernels of a layer are compiled for."""
    packed = [linear.packed for linear in block.linears]
    return tuple((p.bits, p.block, p.scales.dtype, p.perm is None) for p in packed if isinstance(p, BlockedWeight))


def _multiplied(
    linear: torch.nn.Module, x: torch.Tensor, gated: bool = False, near_attention: bool = False
) -> torch.Tensor:
    """linear(x), or of its halves silu(gate) * up."""
    if type(linear) is Linear and linear.weight is not None:
        weight = linear.weight
        if not near_attention and takes_hopper(weight, len(x), x.dtype):
            return product(x, weight, linear.bias, gated=gated)
    y: torch.Tensor = linear(x)
    return silu_mul(y) if gated else y


def _add_and_norm(
    linear: torch.nn.Module, y: torch.Tensor, x: torch.Tensor, norm: RMSNorm, near_attention: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + linear(y)), x + linear(y)) of float32 x, which may be overwritten."""
    if type(linear) is Linear and linear.bias is None:
        if linear.weight is not None:
            if not near_attention and takes_hopper(linear.weight, len(y), y.dtype):
                return add_norm(product(y, linear.weight, residual=x), None, norm.weight, norm.eps)
            return add_norm(add_product(x, y, linear.weight), None, norm.weight, norm.eps)
        packed = linear.packed
        if isinstance(packed, BlockedWeight) and len(y) <= INT_MATMUL_ROWS[packed.bits]:  # as the decoding step does
            return add_norm(product(y, packed, residual=x), None, norm.weight, norm.eps)
    return add_norm(linear(y), x, norm.weight, norm.eps)


def _attend(
    attention: Attention,
    index: int,
    normed: torch.Tensor,
    angles: Angles,
    slots: torch.Tensor,
    cache: KVCache,
    plan: RaggedPlan,
    near: bool,
) -> torch.Tensor:
    new = new_tokens(attention, angles, slots, cache)
    qkv = _multiplied(attention.qkv_proj, normed, near_attention=near).view(len(normed), -1, attention.head_dim)
    return ragged_attention(qkv, new, cache.layers[index], plan, attention.head_dim**-0.5)
