"""A block's forward pass for training on a GPU: what `Block.forward` computes, in fewer passes over its activations.

What it fuses: residual addition, norm and their gradients; the split into heads with the rotation; SwiGLU's gate; and
a frozen layer with its adapter, which keeps its input and the adapter's narrow product alone: dropout is drawn again
in the backward pass, and gradients of the adapter are float32 without a 16-bit stop on the way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear

from qwenfit.kernels.norm import rms_norm_reference
from qwenfit.kernels.packed import PackedWeight, dequantize
from qwenfit.model.attention import Attention, Context
from qwenfit.model.rotary import Angles
from qwenfit.tune.adapters import LoRALinear

if TYPE_CHECKING:
    from qwenfit.kernels.triton.int_matvec import BlockedWeight
    from qwenfit.model.transformer import Block

SEEDS = 2**31 - 8  # a layer's seed lies below this; its four linear layers take it and the three above
# Of torch's attentions in 16 bits, from the fastest on Hopper. The one that takes whole matrices is left out.
HOPPER_ATTENTION = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


def run_block(block: Block, x: Tensor, angles: Angles, context: Context, seed: int = 0) -> Tensor:
    """x [tokens, hidden] -> [tokens, hidden]. seed: what dropout is drawn from, below SEEDS."""
    from qwenfit.kernels.triton.train_gate import silu_mul
    from qwenfit.kernels.triton.train_norm import add_norm

    attention, mlp = block.self_attn, block.mlp
    norm = block.input_layernorm
    normed, x = add_norm(x, None, norm.weight, norm.eps)
    q, k, v = _heads(attention, _product(attention.qkv_proj, normed, seed), angles)
    out = _product(attention.o_proj, _attend(attention.layer, context, q, k, v), seed + 1)
    norm = block.post_attention_layernorm
    normed, x = add_norm(out, x, norm.weight, norm.eps)
    gated = silu_mul(_product(mlp.gate_up_proj, normed, seed + 2))
    return x + _product(mlp.down_proj, gated, seed + 3)


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
    if q.is_cuda and q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device) >= (9, 0):
        with sdpa_kernel(HOPPER_ATTENTION, set_priority=True):
            return context.attend(layer, q, k, v)
    return context.attend(layer, q, k, v)


def _product(module: nn.Module, x: Tensor, seed: int) -> Tensor:
    if isinstance(module, LoRALinear):
        return lora_product(module, x, seed)
    out: Tensor = module(x)
    return out


def lora_product(module: LoRALinear, x: Tensor, seed: int) -> Tensor:
    """`module(x)` for x [tokens, in], with dropout drawn from `seed`."""
    base, lora = module.base, module.lora
    out: Tensor = _LoRAProduct.apply(  # type: ignore[no-untyped-call]
        x, module.lora_A, base.weight, base.packed, base.bias, lora.scale,
        lora.dropout if module.training else 0.0, seed, *module.lora_B,
    )  # fmt: skip
    return out


class _LoRAProduct(torch.autograd.Function):
    """y = x W^T + bias; y_i += s D(x) A_i^T B_i^T for the output rows of each part i, with D dropout."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lora_a: Tensor, weight: Tensor | None, packed: PackedWeight | BlockedWeight | None,
        bias: Tensor | None, scale: float, probability: float, seed: int, *lora_b: Tensor,
    ) -> Tensor:  # fmt: skip
        out = linear(x, _dense(weight, packed, x.dtype), bias)
        down = linear(_dropped(x, probability, seed), lora_a.to(x.dtype)).mul_(scale)
        for part, d, b in zip(_parts(out, lora_b), torch.split(down, lora_b[0].shape[1], 1), lora_b, strict=True):
            part.addmm_(d, b.to(x.dtype).T)
        ctx.save_for_backward(x, down, lora_a, weight, *lora_b)
        ctx.packed, ctx.scale, ctx.probability, ctx.seed = packed, scale, probability, seed
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, down, lora_a, weight, *lora_b = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        rank = lora_b[0].shape[1]
        grad_down, grad_b = torch.empty_like(down), []
        narrow = (torch.split(t, rank, 1) for t in (down, grad_down))
        parts = zip(_parts(grad, lora_b), *narrow, lora_b, strict=True)
        for g, d, gd, b in parts:
            grad_b.append(_wide_product(g.T, d, b.dtype))
            torch.mm(g, b.to(g.dtype), out=gd)
        grad_down.mul_(ctx.scale)
        narrow_a = lora_a.to(grad.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ _dense(weight, ctx.packed, grad.dtype)
            if not ctx.probability:
                grad_x.addmm_(grad_down, narrow_a)
        dropped = x
        if ctx.probability and grad_x is not None:
            from qwenfit.kernels.triton.dropout import dropout_backward

            dropped = grad_down @ narrow_a
            dropout_backward(x, dropped, grad_x, ctx.probability, ctx.seed)
        elif ctx.probability:
            dropped = _dropped(x, ctx.probability, ctx.seed)
        grad_a = _wide_product(grad_down.T, dropped, lora_a.dtype)
        return grad_x, grad_a, None, None, None, None, None, None, *grad_b


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


def _parts(out: Tensor, lora_b: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
    """The columns of each part of a fused layer's result."""
    return torch.split(out, [len(b) for b in lora_b], 1)


def _wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, summed and returned in `dtype` where that is float32."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a.to(dtype)) @ b.to(dtype)
