"""What the tests of the Triton kernels share: they run on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before the kernels are imported

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An output that shows what was not written."""
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """|out - reference| / |reference|; NaN never passes a bound."""
    out, reference = out.detach(), reference.detach()
    return float((out.double() - reference.double()).norm() / reference.double().norm())
