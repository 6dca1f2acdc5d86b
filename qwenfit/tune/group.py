"""Several processes with a copy of the network each (DDP), and how all kinds of groups talk to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qwenfit.errors import NotFound
from qwenfit.model.transformer import Transformer
from qwenfit.tune.batch import TrainBatch
from qwenfit.tune.forward import batch_loss
from qwenfit.tune.optimizer import AdamW
from qwenfit.tune.watch import Watch
from qwenfit.tune.world import World

BUCKET_ELEMENTS = 1 << 24  # gradients that are summed in one all-reduce


class Group(World):
    """The processes of one torchrun, as copies: gradients are summed once a step, rank 0's state is everybody's."""

    def __init__(self, device: str | torch.device, watch: Watch) -> None:
        super().__init__(device)
        self.watch = watch
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def describe(self, model: Transformer, optimizer: AdamW) -> str:
        count = sum(p.numel() for p in model.parameters())
        return f"{self.size} processes with copies of the network: {count:,} of {count:,} parameters each."

    def total(self, value: float) -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return float(tensor)

    def sum_gradients(self, optimizer: AdamW) -> None:
        for names in _buckets(optimizer):
            gradients = [optimizer.gradient(name) for name in names]
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            for name, part in zip(names, torch.split(flat, [g.numel() for g in gradients]), strict=True):
                if name in optimizer.buffers:
                    optimizer.buffers[name].copy_(part.view_as(optimizer.buffers[name]))
                else:
                    parameter = optimizer.parameters[name]
                    parameter.grad = part.view_as(parameter)

    def gather(self, value: Any) -> list[Any]:
        return self.watch.exchange(value)

    def found(self, prepare: Callable[[], Path | None], root: Path) -> Path | None:
        found = prepare() if self.rank == 0 else None
        name = self.gather(None if found is None else found.name)[0]
        if name is None:
            return None
        if not (root / name).is_dir():
            raise NotFound(
                f"Rank {self.rank} does not see {root / name}, which rank 0 resumes from.",
                "Put --output on a file system that all hosts share.",
            )
        return root / str(name)

    def optimizer_states(self, optimizer: AdamW) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        if not self.sharded:
            return super().optimizer_states(optimizer) if self.rank == 0 else ({}, [])
        tensors, described = optimizer.state()
        shapes = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in tensors.items()}
        layouts = self.gather([described, shapes])
        if self.rank:
            for tensor in tensors.values():
                if tensor.numel():
                    dist.send(_as_bytes(tensor), 0)
            return {}, []
        found = {f"0.{name}": tensor.cpu() for name, tensor in tensors.items()}
        for rank in range(1, self.size):
            for name, (shape, dtype) in layouts[rank][1].items():
                part = torch.empty(shape, dtype=getattr(torch, dtype), device=self.device)
                if part.numel():
                    dist.recv(_as_bytes(part), rank)
                found[f"{rank}.{name}"] = part.cpu()
        return found, [layout[0] for layout in layouts]


class Root(nn.Module):
    """The root of a sharded network: its forward pass is a micro-batch's loss, with embedding and head gathered."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TrainBatch, divisor: float, how: dict[str, Any]) -> Tensor:
        model = self.model
        assert isinstance(model, Transformer)
        return batch_loss(model, batch, divisor, **how)


def put(model: Transformer, name: str, parameter: nn.Parameter) -> None:
    """Replace a parameter of the network by another object."""
    module, _, leaf = name.rpartition(".")
    model.get_submodule(module)._parameters[leaf] = parameter


def _as_bytes(tensor: Tensor) -> Tensor:
    """The same memory: a backend need not know the type."""
    return tensor.view(-1).view(torch.uint8)


def _buckets(optimizer: AdamW) -> Iterator[list[str]]:
    """Names of gradients of one type, at most BUCKET_ELEMENTS together or one alone."""
    room: dict[torch.dtype, tuple[int, list[str]]] = {}
    for name, value in optimizer.values.items():
        dtype = optimizer.gradient(name).dtype
        count, names = room.get(dtype, (0, []))
        if names and count + value.numel() > BUCKET_ELEMENTS:
            yield names
            count, names = 0, []
        room[dtype] = (count + value.numel(), [*names, name])
    yield from (names for _, names in room.values())
