"""The processes that train together, as the trainer sees them. Here: one; `distributed.py` has several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenfit.checkpoint.load import Progress, load_model
from qwenfit.config import ModelConfig
from qwenfit.errors import UsageError
from qwenfit.model.transformer import Transformer
from qwenfit.tune.adapters import head_weight, trained_parameters
from qwenfit.tune.batch import TrainBatch
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.forward import batch_loss
from qwenfit.tune.optimizer import AdamW

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class World:
    """One process. Rank r takes every `size`-th micro-batch from its r-th on; rank 0 alone writes."""

    rank = 0
    size = 1
    sharded = False  # whether the optimizer's states are split over the processes

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def configured(self, config: TuneConfig) -> World:
        """These processes, as they train a run whose method is known.

        Raises UsageError for what they cannot do together, NotFound for a package that is not installed.
        """
        if config.deepspeed:
            raise UsageError(
                "DeepSpeed trains in processes that torchrun starts, and there are none.",
                "torchrun --nproc-per-node 1 -m qwenfit tune ... --deepspeed",
            )
        return self

    def describe(self, model: Transformer, optimizer: AdamW) -> str:
        """What each process holds; empty for one process."""
        return ""

    def load(
        self, source: Path | ModelConfig, precision: str, tables: dict[str, Tensor], progress: Progress | None
    ) -> Transformer:
        """The network, filled or to be filled by `prepare`; `tables`: see `put_tables`."""
        model, _ = load_model(source, precision=precision, device=self.device, progress=progress)
        put_tables(model, tables)
        return model

    def adapter_dtype(self, config: TuneConfig, precision: str) -> torch.dtype:
        """Of adapters: float32, their own master weights, but where 16 bits are all that is kept."""
        return torch.bfloat16 if config.optimizer == "bf16" and precision != "fp32" else torch.float32

    def prepare(self, model: Transformer) -> None:
        """Spread the network over the processes: when it is adapted, before the optimizer is made."""

    def optimizer(self, model: Transformer, config: TuneConfig) -> AdamW:
        """The optimizer of what is trained; its states are those of this process's part."""
        return AdamW(
            trained_parameters(model),
            config.optimizer,
            moments=DTYPES[config.moments],
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
            seed=config.seed,
        )

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


@torch.no_grad()
def put_tables(model: Transformer, tables: dict[str, Tensor]) -> None:
    """Give a filled network the trained tables of an adapter: "embed_tokens" | "lm_head" -> [vocab, hidden]."""
    if "embed_tokens" in tables:
        model.embed_tokens.weight.copy_(tables["embed_tokens"])
    if "lm_head" in tables and model.lm_head is not None:
        head_weight(model).copy_(tables["lm_head"])
