"""A block's forward pass for training on a GPU: what `Block.forward` computes, in fewer passes over its activations.

What it fuses: residual addition, norm and their gradients; the split into heads with the rotation; SwiGLU's gate; and
a frozen layer with its adapter, which keeps its input and the adapter's narrow product alone: dropout is drawn again
in the backward pass, and gradients of the adapter are float32 without a 16-bit stop on the way.

A pass of a few thousand tokens is over before Python has launched it, so launches are saved as much as bytes: a layer's
adapters are cast together, and a layer that runs twice (`run_block_twice`) is one node of the graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear

from qwenfit.kernels.norm import rms_norm_reference
from qwenfit.kernels.packed import PackedWeight, dequantize
from qwenfit.model.attention import Attention, Context, FullContext
from qwenfit.model.rotary import Angles
from qwenfit.planning.finetune_qwenfit import LONG_ATTENTION as LONG
from qwenfit.tune.adapters import LoRALinear

if TYPE_CHECKING:
    from qwenfit.kernels.triton.int_matvec import BlockedWeight
    from qwenfit.model.transformer import Block

SEEDS = 2**31 - 8  # a layer's seed lies below this; its four linear layers take it and the three above
# Of torch's attentions in 16 bits, without the one that takes whole matrices. On Hopper cuDNN's is faster than
# FlashAttention 2, but takes longer to launch.
LONG_ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
SHORT_ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def run_block(block: Block, x: Tensor, angles: Angles, context: Context, seed: int = 0) -> Tensor:
    """x [tokens, hidden] -> [tokens, hidden]. seed: what dropout is drawn from, below SEEDS."""
    residual, out = _branches(block, x, angles, context, seed)
    return residual + out


def run_block_twice(
    block: Block, x: Tensor, angles: Angles, context: Context, trained: Tensor, seed: int = 0
) -> Tensor:
    """`run_block` that keeps only x, and runs again for the backward pass.

    Gradients of parameters are added to their `.grad` by a backward pass of the block's own. No hook on a saved tensor
    is called meanwhile, of which torch's checkpoint has some forty a block. trained: a tensor that requires a gradient,
    though it gets none from here: x does not where the embedding is frozen.
    """
    out: Tensor = _Twice.apply(x, trained, block, angles, context, seed)  # type: ignore[no-untyped-call]
    return out


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, trained: Tensor, block: Block, angles: Angles, context: Context, seed: int
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.how = (block, angles, context, seed)
        return run_block(block, x, angles, context, seed)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        block, angles, context, seed = ctx.how
        x = saved.detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad():
            # Of the results only their places in the graph are needed: their sum is not computed, their memory is free.
            edges = [get_gradient_edge(t) for t in _branches(block, x, angles, context, seed) if t.requires_grad]
        torch.autograd.backward(edges, [grad_outputs[0]] * len(edges))
        return x.grad, None, None, None, None, None


def _branches(block: Block, x: Tensor, angles: Angles, context: Context, seed: int) -> tuple[Tensor, Tensor]:
    """What a block's result is the sum of: the residual after attention, and the MLP's result."""
    from qwenfit.kernels.triton.train_gate import silu_mul
    from qwenfit.kernels.triton.train_norm import add_norm

    attention, mlp = block.self_attn, block.mlp
    qkv_narrow, o_narrow, gate_up_narrow, down_narrow = _narrow(block.linears, x.dtype)
    norm = block.input_layernorm
    normed, x = add_norm(x, None, norm.weight, norm.eps)
    q, k, v = _heads(attention, _product(attention.qkv_proj, normed, seed, qkv_narrow), angles)
    attended = _attend(attention.layer, context, q, k, v)
    out = _product(attention.o_proj, attended, seed + 1, o_narrow)
    norm = block.post_attention_layernorm
    normed, x = add_norm(out, x, norm.weight, norm.eps)
    gated = silu_mul(_product(mlp.gate_up_proj, normed, seed + 2, gate_up_narrow))
    return x, _product(mlp.down_proj, gated, seed + 3, down_narrow)


def _narrow(linears: tuple[nn.Module, ...], dtype: torch.dtype) -> list[list[Tensor]]:
    """Each layer's A and Bs in the activations' type, cast by one kernel; nothing for a layer without adapter."""
    wide = [[m.lora_A, *m.lora_B] if isinstance(m, LoRALinear) else [] for m in linears]
    source = [t for each in wide for t in each]
    if all(t.dtype == dtype for t in source):
        return wide
    with torch.no_grad():
        room = torch.empty(sum(t.numel() for t in source), dtype=dtype, device=source[0].device)
        parts = torch.split(room, [t.numel() for t in source])
        narrow = [part.view(t.shape) for part, t in zip(parts, source, strict=True)]
        torch._foreach_copy_(narrow, source)
    left = iter(narrow)
    return [[next(left) for _ in each] for each in wide]


def _heads(attention: Attention, qkv: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
    from qwenfit.kernels.triton.train_rotary import rotated_heads

    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    if attention.q_norm is not None and attention.k_norm is not None:
        split = qkv.view(len(qkv), -1, attention.head_dim)
        weights = (attention.q_norm.weight.expand(heads, -1), attention.k_norm.weight.expand(kv_heads, -1))
        normed = rms_norm_reference(split[:, :-kv_heads], torch.cat(weights), attention.eps)
        qkv = torch.cat((normed, split[:, -kv_heads:]), 1).flatten(1)
    return rotated_heads(qkv, angles.cos, angles.sin, heads, kv_heads)


def _attend(layer: int, context: Context, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    order = None
    if isinstance(context, FullContext) and q.is_cuda and q.dtype != torch.float32:
        order = attention_order(q.shape[0] // context.batch, torch.cuda.get_device_capability(q.device))
    if order is None:
        return context.attend(layer, q, k, v)
    with sdpa_kernel(order, set_priority=True):
        return context.attend(layer, q, k, v)


def attention_order(length: int, capability: tuple[int, int]) -> list[SDPBackend] | None:
    """Torch's attentions for samples of `length` tokens, the fastest first; None before Hopper: torch's own order."""
    if capability < (9, 0):
        return None
    return LONG_ATTENTION if length >= LONG else SHORT_ATTENTION


def _product(module: nn.Module, x: Tensor, seed: int, narrow: list[Tensor]) -> Tensor:
    if isinstance(module, LoRALinear):
        return lora_product(module, x, seed, narrow)
    out: Tensor = module(x)
    return out


def lora_product(module: LoRALinear, x: Tensor, seed: int, narrow: list[Tensor]) -> Tensor:
    """`module(x)` for x [tokens, in], with dropout drawn from `seed`; narrow: A and the Bs in x's type."""
    base, lora = module.base, module.lora
    out: Tensor = _LoRAProduct.apply(  # type: ignore[no-untyped-call]
        x, base.weight, base.packed, base.bias, lora.scale, lora.dropout if module.training else 0.0, seed,
        [t.detach() for t in narrow], module.lora_A, *module.lora_B,
    )  # fmt: skip
    return out


class _LoRAProduct(torch.autograd.Function):
    """y = x W^T + bias; y_i += s D(x) A_i^T B_i^T for the output rows of each part i, with D dropout.

    A and the Bs come twice: narrow, to be read, and as they are trained, to be given gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, packed: PackedWeight | BlockedWeight | None, bias: Tensor | None,
        scale: float, probability: float, seed: int, narrow: list[Tensor], *trained: Tensor,
    ) -> Tensor:  # fmt: skip
        a, *bs = narrow
        out = linear(x, _dense(weight, packed, x.dtype), bias)
        down = linear(_dropped(x, probability, seed), a).mul_(scale)
        for part, d, b in zip(_parts(out, bs), torch.split(down, bs[0].shape[1], 1), bs, strict=True):
            part.addmm_(d, b.T)
        ctx.save_for_backward(x, down, weight, *narrow)
        ctx.packed, ctx.scale, ctx.probability, ctx.seed, ctx.dtype = packed, scale, probability, seed, trained[0].dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, down, weight, a, *bs = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        rank = bs[0].shape[1]
        grad_down, grad_b = torch.empty_like(down), []
        narrow = (torch.split(t, rank, 1) for t in (down, grad_down))
        for g, d, gd, b in zip(_parts(grad, bs), *narrow, bs, strict=True):
            grad_b.append(_wide_product(g.T, d, ctx.dtype))
            torch.mm(g, b, out=gd)
        grad_down.mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _dense(weight, ctx.packed, grad.dtype)
            if not ctx.probability:
                grad_x.addmm_(grad_down, a)
        dropped = x
        if ctx.probability and grad_x is not None:
            from qwenfit.kernels.triton.dropout import dropout_backward

            dropped = grad_down @ a
            dropout_backward(x, dropped, grad_x, ctx.probability, ctx.seed)
        elif ctx.probability:
            dropped = _dropped(x, ctx.probability, ctx.seed)
        grad_a = _wide_product(grad_down.T, dropped, ctx.dtype)
        return grad_x, None, None, None, None, None, None, None, grad_a, *grad_b


def _dense(weight: Tensor | None, packed: PackedWeight | BlockedWeight | None, dtype: torch.dtype) -> Tensor:
    """The frozen weight [out, in]; a packed one is made dense for one product, and kept by nobody."""
    if weight is not None:
        return weight
    assert packed is not None
    return dequantize(packed, dtype)


def _dropped(x: Tensor, probability: float, seed: int) -> Tensor:
    if not probability:
        return x
    from qwenfit.kernels.triton.dropout import dropout

    return dropout(x.contiguous(), probability, seed)


def _parts(out: Tensor, lora_b: list[Tensor]) -> tuple[Tensor, ...]:
    """The columns of each part of a fused layer's result."""
    return torch.split(out, [len(b) for b in lora_b], 1)


def _wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, summed and returned in `dtype` where that is float32."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a.to(dtype)) @ b.to(dtype)
