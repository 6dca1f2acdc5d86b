"""What would stop a step with prompts: kernels to be compiled, and those of the vendor, which it loads when they come.

The vendor's library has another kernel for nearly every number of rows, and takes some 10 ms to load one, in which the
device has nothing to do. So steps are padded to one of few numbers, whose kernels are loaded at the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from qwenfit.engine.padding import padded_sizes
from qwenfit.kernels.choice import INT_MATMUL_ROWS
from qwenfit.kernels.wide import add_product, wide_product
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.transformer import Block, Transformer

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # of x and a weight, into the third


@torch.inference_mode()
def compile_prompts(model: Transformer, cache: KVCache, device: torch.device) -> None:
    """Compile the attention of prompts with each config that a length may choose, and the rotations before it."""
    from qwenfit.kernels.triton.decode_attention import NewTokens
    from qwenfit.kernels.triton.prompt_attention import Turn
    from qwenfit.kernels.triton.ragged import compile_prompt_attention, rotate_in_place

    config, count, layer = model.config, 16, model.layers[0]
    assert isinstance(layer, Block)
    attention = layer.self_attn
    heads = config.num_heads + 2 * config.num_kv_heads
    qkv = torch.zeros(count, heads, config.head_dim, dtype=model.dtype, device=device)
    at = torch.arange(count, device=device)
    angles = model.rotary.angles(at, [count], [1.0], math.inf, model.dtype)
    norms = None
    if attention.q_norm is not None and attention.k_norm is not None:
        norms = (attention.q_norm.weight, attention.k_norm.weight)
    centre = attention.key_centre if cache.dtype == "int8" else None
    nowhere = torch.full_like(at, -1)
    new = NewTokens(angles.cos, angles.sin, angles.query_scale, norms, attention.eps, nowhere, centre)
    rotate_in_place(qkv, new, cache.layers[0], 0)
    if model.dtype != torch.float32:
        turn = Turn(angles.cos, angles.sin, angles.query_scale) if norms is None else None
        compile_prompt_attention(qkv, config.num_kv_heads, turn)
        if turn is not None:
            rotate_in_place(qkv, new, cache.layers[0], 0, queries=False)


@torch.inference_mode()
def load_products(model: Transformer, cache: KVCache, max_rows: int, max_logits: int) -> None:
    """Run a layer's products with every number of rows that `padded` gives up to `max_rows`, and the head's.

    The cache must be empty: it serves as memory, and then holds anything. What it has no room for is left out.
    """
    from qwenfit.kernels.triton.dequantise import dequantised
    from qwenfit.kernels.triton.int_matvec import BlockedWeight

    layer = model.layers[0]
    assert isinstance(layer, Block)
    memory = Memory(cache.memory)

    def run(product: Product, weight: torch.Tensor, rows: int, dtype: torch.dtype) -> None:
        x, y = memory.take(rows, weight.shape[1], weight.dtype), memory.take(rows, weight.shape[0], dtype)
        if x is not None and y is not None:
            product(x, weight, y)

    for linear in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
        packed = linear.packed
        weight: torch.Tensor | None = linear.weight
        adds = packed is None and linear in (layer.self_attn.o_proj, layer.mlp.down_proj)
        for rows in padded_sizes(max_rows):
            memory.used = 0
            if isinstance(packed, BlockedWeight) and rows > INT_MATMUL_ROWS:  # unpacked for the vendor's product
                unpacked = memory.take(packed.out_features, packed.in_features, model.dtype)
                weight = None if unpacked is None else dequantised(packed, model.dtype, unpacked)
            if weight is None:
                continue
            if adds:
                run(lambda x, weight, y: add_product(y, x, weight), weight, rows, torch.float32)
            else:
                run(partial(_linear, linear.bias), weight, rows, model.dtype)
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    for rows in padded_sizes(max_logits):
        memory.used = 0
        if isinstance(head.weight, torch.Tensor):
            run(wide_product, head.weight, rows, torch.float32)


def _linear(bias: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


class Memory:
    """Hands out tensors of a tensor of bytes, one after the other."""

    def __init__(self, of: torch.Tensor) -> None:
        self.of, self.used = of, 0

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor | None:
        """[rows, columns]; None: there is not as much left."""
        first, size = self.used, rows * columns * dtype.itemsize
        self.used += -(-size // 256) * 256
        return self.of[first : first + size].view(dtype).view(rows, columns) if self.used <= len(self.of) else None
