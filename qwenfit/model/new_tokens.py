"""What the fused kernels of a GPU must know of a step's own tokens in a layer."""

from __future__ import annotations

import torch

from qwenfit.kernels.triton.decode_attention import NewTokens
from qwenfit.model.attention import Attention
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.rotary import Angles


def new_tokens(attention: Attention, angles: Angles, slots: torch.Tensor, cache: KVCache) -> NewTokens:
    """Of tokens with these angles, whose keys and values go to `slots`."""
    norms = None
    if attention.q_norm is not None and attention.k_norm is not None:
        norms = (attention.q_norm.weight, attention.k_norm.weight)
    centre = attention.key_centre if cache.dtype == "int8" else None
    return NewTokens(angles.cos, angles.sin, angles.query_scale, norms, attention.eps, slots, centre)
