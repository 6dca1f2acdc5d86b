"""What would stop a step with prompts: kernels to be compiled, and those of the vendor, which it loads when they come.

The vendor's library has another kernel for nearly every number of rows, and takes some 10 ms to load one, in which the
device has nothing to do. So steps are padded to one of few numbers, whose kernels are loaded at the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch

from qwenfit.engine.padding import padded_sizes
from qwenfit.kernels.choice import HOPPER_ROWS, INT_MATMUL_ROWS
from qwenfit.kernels.triton.dequantise import dequantised
from qwenfit.kernels.triton.int_matvec import BlockedWeight
from qwenfit.kernels.triton.product import product, takes_hopper
from qwenfit.kernels.triton.prompt_attention import Turn
from qwenfit.kernels.triton.ragged import compile_prompt_attention, rotate_in_place
from qwenfit.kernels.wide import add_product, wide_product
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.linear import Linear
from qwenfit.model.new_tokens import new_tokens
from qwenfit.model.transformer import Block, Transformer

Product = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # of x and a weight, into the third


@torch.inference_mode()
def compile_prompts(model: Transformer, cache: KVCache, device: torch.device) -> None:
    """Compile the attention of prompts with each config that a length may choose, and the rotations before it."""
    config, count, layer = model.config, 16, model.layers[0]
    assert isinstance(layer, Block)
    heads = config.num_heads + 2 * config.num_kv_heads
    qkv = torch.zeros(count, heads, config.head_dim, dtype=model.dtype, device=device)
    at = torch.arange(count, device=device)
    angles = model.rotary.angles(at, [count], [1.0], math.inf, model.dtype)
    new = new_tokens(layer.self_attn, angles, torch.full_like(at, -1), cache)
    none = torch.zeros(1, dtype=torch.int32, device=device)
    rotate_in_place(qkv, new, cache.layers[0], none)
    if model.dtype != torch.float32:
        turn = Turn(angles.cos, angles.sin, angles.query_scale) if new.head_norms is None else None
        compile_prompt_attention(qkv, config.num_kv_heads, turn)
        if turn is not None:
            rotate_in_place(qkv, new, cache.layers[0], none, queries=False)


@torch.inference_mode()
def compile_many_rows(model: Transformer, device: torch.device) -> None:
    """Launch a layer's products with each number of rows that a Hopper's kernel is compiled for: every 32."""
    layer = model.layers[0]
    assert isinstance(layer, Block)
    attention, mlp = layer.self_attn, layer.mlp
    for linear in layer.linears:
        if type(linear) is not Linear or linear.weight is None:  # one with an adapter around it, or a packed one
            continue
        for rows in range(64, HOPPER_ROWS + 1, 32):
            if takes_hopper(linear.weight, rows, model.dtype):
                out, inputs = linear.weight.shape
                adds = linear in (attention.o_proj, mlp.down_proj) and linear.bias is None
                x = torch.zeros(rows, inputs, dtype=model.dtype, device=device)
                residual = torch.zeros(rows, out, device=device) if adds else None
                product(x, linear.weight, linear.bias, residual, gated=linear is mlp.gate_up_proj)


@torch.inference_mode()
def load_products(model: Transformer, cache: KVCache, max_rows: int, max_logits: int) -> None:
    """Run a layer's products with every number of rows that `padded` gives up to `max_rows`, and the head's.

    The cache must be empty: it serves as memory, and then holds anything. What it has no room for is left out.
    """
    layer = model.layers[0]
    assert isinstance(layer, Block)
    sizes = list(padded_sizes(max_rows))
    for linear in layer.linears:
        if linear.weight is not None:
            own = linear in (layer.mlp.gate_up_proj, layer.mlp.down_proj)
            of_vendor = [rows for rows in sizes if not (own and takes_hopper(linear.weight, rows, model.dtype))]
            adds = linear in (layer.self_attn.o_proj, layer.mlp.down_proj)
            run, dtype = (_add, torch.float32) if adds else (partial(_linear, linear.bias), model.dtype)
            _run(run, linear.weight, of_vendor, dtype, cache.memory)
        elif isinstance(linear.packed, BlockedWeight):
            # For fewest rows the kernel is not always one that the decoding step has compiled: of a gate it has both.
            linear(torch.zeros(sizes[0], linear.packed.in_features, dtype=model.dtype, device=cache.memory.device))
            many = [rows for rows in sizes if rows > INT_MATMUL_ROWS[linear.packed.bits]]
            if not many:
                continue
            weight, rest = _cut(cache.memory, linear.packed.out_features, linear.packed.in_features, model.dtype)
            if weight is not None:  # many rows take the vendor's product of the unpacked weight
                dequantised(linear.packed, model.dtype, weight)
                _run(partial(_linear, linear.bias), weight, many, model.dtype, rest)
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    if isinstance(head.weight, torch.Tensor):
        _run(wide_product, head.weight, padded_sizes(max_logits), torch.float32, cache.memory)


def _run(
    multiply: Product, weight: torch.Tensor, sizes: Iterable[int], dtype: torch.dtype, memory: torch.Tensor
) -> None:
    """The product of so many rows each, with a result of `dtype`, where `memory` has room for it."""
    for rows in sizes:
        x, rest = _cut(memory, rows, weight.shape[1], weight.dtype)
        y, _ = _cut(rest, rows, weight.shape[0], dtype)
        if x is not None and y is not None:
            multiply(x, weight, y)


def _cut(memory: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor]:
    """[rows, columns] of some bytes, or None where they are too few, and those left."""
    size = rows * columns * dtype.itemsize
    part = memory[:size].view(dtype).view(rows, columns) if size <= len(memory) else None
    return part, memory[-(-size // 256) * 256 :]


def _add(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return add_product(out, x, weight)


def _linear(bias: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)
