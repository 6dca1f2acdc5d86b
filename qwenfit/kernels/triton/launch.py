"""What every launch of a kernel here shares."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def start_after_previous(overlap: tl.constexpr):
    """Wait for the kernel before this one; the kernel after may start its own prologue.

    What stands above this call may read weights only: with programmatic dependent launch it runs beside the previous
    kernel. Every kernel calls it once, so that the completion of one implies that of all before it.
    """
    if overlap:
        gdc_launch_dependents()
        gdc_wait()


@functools.cache
def _overlaps(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def options(tensor: torch.Tensor) -> dict[str, Any]:
    """Keyword arguments of a launch on `tensor`'s device: programmatic dependent launch where there is such a thing."""
    if INTERPRETED or not _overlaps(tensor.device):
        return {"OVERLAP": False}
    return {"OVERLAP": True, "launch_pdl": True}
