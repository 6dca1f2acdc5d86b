"""What would stop a step with prompts: kernels to be compiled, and those of the vendor, which it loads when they come.

The vendor's library has another kernel for nearly every number of rows, and takes some 10 ms to load one, in which the
device has nothing to do. So steps are padded to one of few numbers, whose kernels are loaded at the start.
"""

from __future__ import annotations

import math

import torch

from qwenfit.engine.padding import padded_sizes
from qwenfit.kernels.choice import INT_MATMUL_ROWS
from qwenfit.kernels.wide import add_product
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.transformer import Block, Transformer


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
def load_products(model: Transformer, cache: KVCache, max_rows: int) -> None:
    """Run a layer's products with every number of rows that `padded` gives up to `max_rows`.

    The cache must be empty: it serves as memory, and its first layer then holds anything.
    """
    from qwenfit.kernels.triton.dequantise import dequantised
    from qwenfit.kernels.triton.int_matvec import BlockedWeight

    layer = model.layers[0]
    assert isinstance(layer, Block)
    memory = [x.view(torch.uint8).flatten() for x in (cache.layers[0].key, cache.layers[0].value)]
    for linear in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
        plain = linear.packed is None
        weight: torch.Tensor | None = linear.weight
        if isinstance(linear.packed, BlockedWeight):
            weight = dequantised(linear.packed, model.dtype)  # as it is multiplied with many rows
        adds = plain and linear in (layer.self_attn.o_proj, layer.mlp.down_proj)
        for rows in padded_sizes(max_rows):
            if weight is not None and (plain or rows > INT_MATMUL_ROWS):
                _multiply(weight, linear.bias, rows, adds, memory)


def _multiply(
    weight: torch.Tensor, bias: torch.Tensor | None, rows: int, adds: bool, memory: list[torch.Tensor]
) -> None:
    out, inputs = weight.shape
    dtype = torch.float32 if adds else weight.dtype
    needed = rows * inputs * weight.dtype.itemsize, rows * out * dtype.itemsize
    if any(len(have) < bytes_ for have, bytes_ in zip(memory, needed, strict=True)):
        return  # nor has it room for such a prompt
    x = memory[0][: needed[0]].view(weight.dtype).view(rows, inputs)
    y = memory[1][: needed[1]].view(dtype).view(rows, out)
    if adds:
        add_product(y, x, weight)
    elif bias is not None:
        torch.addmm(bias, x, weight.T, out=y)
    else:
        torch.mm(x, weight.T, out=y)
