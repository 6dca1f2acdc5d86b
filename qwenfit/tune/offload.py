"""What waits in host memory: tensors that the backward pass needs, and the embedding when it is not trained."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qwenfit.model.transformer import Transformer

MIN_BYTES = 1 << 20  # smaller ones are not worth a copy


@dataclass
class _Parked:
    host: Tensor
    ready: torch.cuda.Event  # the copy to the host is done
    device: torch.device


def park_embedding(model: Transformer) -> None:
    """Move a frozen embedding that is no head too to the host: a micro-batch reads a few of its rows.

    A seventh of Qwen-7B's bytes in int4, a twelfth in bf16. Nothing is done where the network itself is on the CPU.
    """
    table = model.embed_tokens.weight
    if table.is_cuda and not table.requires_grad and model.lm_head is not None:
        model.embed_tokens.weight = nn.Parameter(table.detach().cpu(), requires_grad=False)


def embed(embedding: nn.Embedding, ids: Tensor, device: torch.device) -> Tensor:
    """Rows `ids` int64 [T], on the CPU, of the table, on `device`: [T, hidden]."""
    table = embedding.weight
    if table.device == device:
        out: Tensor = embedding(to_device(ids, device))
        return out
    rows = torch.empty(len(ids), table.shape[1], dtype=table.dtype, pin_memory=device.type == "cuda")
    torch.index_select(table.detach(), 0, ids, out=rows)
    return rows.to(device, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device`; a GPU fetches it without the host's waiting for what the GPU does now."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


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
