"""RMSNorm, as every Qwen applies it (arXiv 1910.07467; modeling_qwen.py of the Nov-2023 release)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in the shape and dtype of x.

    Normalised in float32, cast to x.dtype, then multiplied by `weight` [width]: the order of the originals.
    """
    return F.rms_norm(x, x.shape[-1:], None, eps) * weight
