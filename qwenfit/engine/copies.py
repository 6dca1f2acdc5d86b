"""Copies between host and device that make neither wait for the other."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor


def tensor_of(numbers: Sequence[int]) -> Tensor:
    """int64 [n], three times as fast as torch.tensor."""
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`; the host does not wait for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def to_host(tensor: Tensor) -> Tensor:
    """On the CPU, once the device has come so far; a CPU tensor itself."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
