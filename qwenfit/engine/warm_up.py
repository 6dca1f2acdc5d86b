"""What would stop the first steps with prompts: kernels of the vendor, loaded when a shape first needs them."""

from __future__ import annotations

import torch

from qwenfit.kernels.wide import add_product
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.transformer import Block, Transformer

ROWS = 128  # apart; between two of them the library takes the kernel of one or the other


@torch.inference_mode()
def load_products(model: Transformer, cache: KVCache, max_rows: int) -> None:
    """Run a layer's products with every ROWS-th number of rows up to `max_rows`, on what the cache has as memory.

    The cache must be empty; its first layer then holds anything.
    """
    layer = model.layers[0]
    assert isinstance(layer, Block)
    linears = (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj)
    weights = [linear.weight for linear in linears if linear.weight is not None]
    if len(weights) < len(linears):
        return  # packed weights are multiplied by kernels of our own, or after being unpacked
    key, value = (x.view(torch.uint8).flatten() for x in (cache.layers[0].key, cache.layers[0].value))
    widest = max(weight.shape[0] for weight in weights)
    rows = min(max_rows, len(key) // (widest * model.dtype.itemsize), len(value) // (widest * 4))
    for count in range(ROWS, rows + 1, ROWS):
        for linear, weight in zip(linears, weights, strict=True):
            out, inputs = weight.shape
            x = _memory(key, count, inputs, model.dtype)
            if linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
                add_product(_memory(value, count, out, torch.float32), x, weight)
            elif linear.bias is not None:
                torch.addmm(linear.bias, x, weight.T, out=_memory(value, count, out, model.dtype))
            else:
                torch.mm(x, weight.T, out=_memory(value, count, out, model.dtype))


def _memory(of: torch.Tensor, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return of[: rows * columns * dtype.itemsize].view(dtype).view(rows, columns)
