"""Rotary position embedding on queries and keys (arXiv 2104.09864), in the half-split order of GPT-NeoX."""

from __future__ import annotations

import torch

from qwenfit.kernels import block


def rotate_reference(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each head of x [tokens, heads, head_dim]; the result has x's dtype.

    cos and sin are float32 [tokens, 1, head_dim]; the first half of `sin` is negated already, so that swapping the
    halves of x is all that "rotate half" takes. The rotation is float32 whatever x is, as in Qwen-1.
    """
    half = x.shape[-1] // 2
    return torch.addcmul(x * cos, x.roll(half, -1), sin).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As the reference. The heads of a token lie side by side in x."""
    return block.rotate(x, cos, sin) if block.usable(x) else rotate_reference(x, cos, sin)


def both_halves(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of angles [T, head_dim / 2] what `rotate` takes: [T, 1, head_dim] each, the first half of sin negated."""
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]
