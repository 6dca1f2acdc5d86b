"""The processes that train together, as the trainer sees them. Here: one; `distributed.py` has several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenfit.model.transformer import Transformer
from qwenfit.tune.batch import TrainBatch
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.forward import batch_loss
from qwenfit.tune.optimizer import AdamW


class World:
    """One process. Rank r takes every `size`-th micro-batch from its r-th on; rank 0 alone writes."""

    rank = 0
    size = 1
    sharded = False  # whether parameters, gradients and optimizer states are split over the processes

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def configure(self, config: TuneConfig) -> None:
        """Once the method is known. Raises UsageError for what these processes cannot do together."""

    def describe(self, model: Transformer) -> str:
        """What each process holds; empty for one process."""
        return ""

    def prepare(self, model: Transformer) -> None:
        """Spread the network over the processes: when it is adapted and filled, before the optimizer is made."""

    def loss(self, model: Transformer, batch: TrainBatch, divisor: float, *, last: bool = True, **how: Any) -> Tensor:
        """`batch_loss`. last: the gradients of this step's micro-batches are summed over processes after this one."""
        return batch_loss(model, batch, divisor, **how)

    def total(self, value: float) -> float:
        """The sum of `value` over the processes."""
        return value

    def sum_gradients(self, optimizer: AdamW) -> None:
        """Make every process's gradients the sum over all of them."""

    def gradient_norm(self, optimizer: AdamW) -> float:
        """The norm over all gradients, each counted once however it is sharded."""
        return float(optimizer.gradient_norm())

    def gather(self, value: Any) -> list[Any]:
        """A JSON value of every process, by rank."""
        return [value]

    def found(self, prepare: Callable[[], Path | None], root: Path) -> Path | None:
        """The checkpoint in `root` that rank 0's `prepare` found, as every process sees it."""
        return prepare()

    def optimizer_states(self, optimizer: AdamW) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """(tensors under "RANK.NAME", JSON) of every process whose state differs; on rank 0, empty on others."""
        tensors, described = optimizer.state()
        return {f"0.{name}": tensor for name, tensor in tensors.items()}, [described]

    @contextmanager
    def whole(self, model: Transformer) -> Iterator[None]:
        """While active, what is trained is whole on rank 0."""
        yield
