"""Tensors that the backward pass needs wait in pinned host memory, copied while the GPU computes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MIN_BYTES = 1 << 20  # smaller ones are not worth a copy


@dataclass
class _Parked:
    host: Tensor
    ready: torch.cuda.Event  # the copy to the host is done
    device: torch.device


def offload_saved_tensors(device: torch.device) -> AbstractContextManager[None]:
    """While active, activations that autograd saves are moved to the host, and back when they are asked for.

    Parameters and views of them stay: they are on the device anyway.
    """
    return torch.autograd.graph.saved_tensors_hooks(_Park(device).pack, _unpark)


class _Park:
    """The copies run on a stream of their own, so that the next layer starts while the last one's input leaves."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def pack(self, tensor: Tensor) -> Tensor | _Parked:
        if not tensor.is_cuda or tensor.nbytes < MIN_BYTES or _is_parameter(tensor):
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self.stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self.stream)  # its memory is not reused before the copy has read it
        return _Parked(host, self.stream.record_event(), tensor.device)


def _unpark(parked: Tensor | _Parked) -> Tensor:
    if isinstance(parked, Tensor):
        return parked
    torch.cuda.current_stream(parked.device).wait_event(parked.ready)
    return parked.host.to(parked.device, non_blocking=True)


def _is_parameter(tensor: Tensor) -> bool:
    base = tensor if tensor._base is None else tensor._base
    return isinstance(base, nn.Parameter)
