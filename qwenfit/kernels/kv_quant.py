"""Uint8 keys and values: ours, per token and head, and Qwen-1's own, kept for parity with the original code.

Both store x as q with x = scale * (q - zero); zero is not rounded.
"""

from __future__ import annotations

import torch

CONSTANT = 2.0**-30  # the scale of a vector whose numbers are all the same: as little as its spread, so it weighs least


def quantize_kv(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [..., head_dim] with one scale and zero for each vector, rounded to nearest, in float32.

    Returns q uint8 [..., head_dim] and float32 [..., 2]: scale = (max - min) / 255 and zero = -min / scale.
    A constant vector gets scale CONSTANT and is kept exactly. Half a step is the largest error.
    """
    x = x.float()
    low, high = x.aminmax(dim=-1, keepdim=True)
    scale = (high - low) / 255
    scale = torch.where(scale > 0, scale, CONSTANT)
    zero = -low / scale
    return ((x - low) / scale).round_().to(torch.uint8), torch.cat((scale, zero), dim=-1)


def dequantize_kv(q: torch.Tensor, affine: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """scale * (q - zero) in float32, then cast: the inverse of `quantize_kv` up to its rounding."""
    return ((q - affine[..., 1:]) * affine[..., :1]).to(dtype)


def quantize_kv_qwen1(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The quantizer of Qwen-1's uint8 cache, bit for bit (quantize_cache_v of modeling_qwen.py, Nov-2023 release).

    x [batch, heads, tokens, head_dim], in one call the whole chunk: a head has one scale for all its tokens, steps
    are truncated instead of rounded, and all arithmetic is in x's dtype.
    Returns q uint8 like x, scale and zero [batch, heads, tokens, 1] in x's dtype.
    """
    flat = x.flatten(2)
    low, high = flat.amin(-1, keepdim=True)[..., None], flat.amax(-1, keepdim=True)[..., None]
    scale = (high - low) / 255
    zero = -low / scale
    q = (x / scale + zero).clamp_(0, 255).to(torch.uint8)
    tokens = (*x.shape[:-1], 1)
    return q, scale.expand(tokens), zero.expand(tokens)
