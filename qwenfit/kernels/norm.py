"""RMSNorm, as every Qwen applies it (arXiv 1910.07467; modeling_qwen.py of the Nov-2023 release)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwenfit.kernels import block


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the shape and dtype of x.

    Normalised in float32, cast to x.dtype, then multiplied by `weight`, which broadcasts against x: the order of the
    originals, and bit for bit their results.
    """
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As the reference, up to the order of the sum: a unit in the last place."""
    if block.usable(x) and weight.dim() == 1 and weight.dtype == x.dtype:
        return block.rms_norm(x, weight, eps)
    return rms_norm_reference(x, weight, eps)
