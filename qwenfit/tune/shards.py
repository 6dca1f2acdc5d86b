"""ZeRO by torch's fully_shard: each process keeps its rows of every weight, gradient and optimizer state.

ZeRO (arXiv 1910.02054): stage 3 gathers each block's weights for its forward and again for its backward pass; stage 2
keeps them gathered from a step's first micro-batch to its last. The network is made without memory, sharded, and then
each process reads its own rows from the checkpoint: none ever holds it whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from qwenfit.checkpoint.load import FLOAT_PRECISIONS, Progress, open_weights
from qwenfit.checkpoint.resolve import resolve_model
from qwenfit.checkpoint.weights import CanonicalWeights
from qwenfit.config import ModelConfig
from qwenfit.model.transformer import Transformer
from qwenfit.tune.adapters import LoRALinear
from qwenfit.tune.batch import TrainBatch
from qwenfit.tune.group import Group, Root, put
from qwenfit.tune.optimizer import AdamW, local
from qwenfit.tune.watch import Watch


class Shards(Group):
    """Stage 2 or 3."""

    sharded = True

    def __init__(self, device: torch.device, watch: Watch, stage: int) -> None:
        super().__init__(device, watch)
        self.stage = stage
        self.sync_once = False

    def load(
        self, source: Path | ModelConfig, precision: str, tables: dict[str, Tensor], progress: Progress | None
    ) -> Transformer:
        config = resolve_model(source)
        weights = open_weights(config)
        weights.check_surplus()
        self.unread = (weights, tables, progress)
        model = Transformer(config, FLOAT_PRECISIONS[precision], "meta").eval()
        return model.requires_grad_(False)

    def prepare(self, model: Transformer) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        # Adapters' gradients are small: they add up whole and are summed once a step. Those of whole weights are
        # scattered after every micro-batch, since holding them whole is what sharding is there to avoid.
        self.sync_once = 4 * sum(p.numel() for p in trained) < sum(p.numel() for p in model.parameters())
        self.root = shard(model, self.device, self.stage)
        fill(model, *self.unread, self.rank, self.size, self.device)
        del self.unread
        assert_sharded(model, self.size)

    def describe(self, model: Transformer, optimizer: AdamW) -> str:
        mine, total = held(model)
        return (
            f"{self.size} processes with shards of the network (ZeRO-{self.stage}): {mine:,} of {total:,} "
            "parameters each."
        )

    def loss(self, model: Transformer, batch: TrainBatch, divisor: float, *, last: bool = True, **how: Any) -> Tensor:
        assert isinstance(self.root, FSDPModule)
        self.root.set_requires_gradient_sync(last or not self.sync_once)
        self.root.set_reshard_after_backward(last or self.stage == 3)
        loss: Tensor = self.root(batch, divisor, how)
        return loss

    def sum_gradients(self, optimizer: AdamW) -> None:
        """fully_shard did in the backward pass."""

    def gradient_norm(self, optimizer: AdamW) -> float:
        mine = float(optimizer.gradient_norm())
        return float(self.total(mine * mine) ** 0.5)

    @contextmanager
    def whole(self, model: Transformer) -> Iterator[None]:
        """As in World: a trained parameter's shards are gathered one after the other, and lie on rank 0's host."""
        sharded: dict[str, nn.Parameter] = {}
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for name, parameter in list(model.named_parameters()):
            if parameter.requires_grad:
                full = parameter.detach().full_tensor()  # type: ignore[attr-defined]
                if self.rank == 0:
                    sharded[name] = parameter
                    put(model, name, nn.Parameter(full.cpu()))
        try:
            yield
        finally:
            for name, parameter in sharded.items():
                put(model, name, parameter)


def shard(model: Transformer, device: torch.device, stage: int) -> Root:
    """Shard every block, and the rest as one unit, over all processes; gradients are summed, in float32."""
    # The mesh names its device: fully_shard would take the GPU of a host that has one (pytorch#132471).
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=stage == 3)
    root = Root(model)
    fully_shard(root, mesh=mesh, mp_policy=policy, reshard_after_forward=False)  # the backward pass begins with it
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the trained tokens of all processes
    return root


@torch.no_grad()
def fill(
    model: Transformer,
    weights: CanonicalWeights,
    tables: dict[str, Tensor],
    progress: Progress | None,
    rank: int,
    size: int,
    device: torch.device,
) -> None:
    """Read this process's rows of each sharded parameter, one after the other, into memory of its own.

    fully_shard gives rank r rows r n to (r + 1) n, where n is the rows over the processes, rounded up. tables: see
    `put_tables`; they stand in for the checkpoint's.
    """
    done = 0
    for parameter in weights.in_file_order():
        module = model.get_submodule(parameter.module)
        module = module.base if isinstance(module, LoRALinear) else module
        sharded = getattr(module, parameter.suffix)
        values = torch.empty(sharded.to_local().shape, dtype=sharded.dtype, device=device)
        start = min(rank * -(-parameter.shape[0] // size), parameter.shape[0])
        table = tables.get(parameter.module)
        if table is not None:
            values.copy_(table[start : start + len(values)])
        elif values.numel():
            weights.read_rows(parameter, start, values)
        mine = DTensor.from_local(
            values,
            sharded.device_mesh,
            sharded.placements,
            run_check=False,
            shape=sharded.shape,
            stride=sharded.stride(),
        )
        module.load_state_dict({parameter.suffix: mine}, assign=True, strict=False)
        done += weights.stored_size(parameter)
        if progress is not None:
            progress(done, weights.stored_bytes)


def assert_sharded(model: Transformer, size: int) -> None:
    """Raises RuntimeError unless each process really holds 1 / size of every parameter, in rows rounded up."""
    for name, parameter in model.named_parameters():
        rows = -(-parameter.shape[0] // size)
        most = rows * (parameter.numel() // parameter.shape[0])
        part = local(parameter.detach())
        if not hasattr(parameter, "to_local") or part.untyped_storage().nbytes() > most * part.itemsize:
            raise RuntimeError(f"{name} is not sharded: a process holds more than {most} of {parameter.numel()}")


def held(model: Transformer) -> tuple[int, int]:
    """(parameters that this process holds, parameters in all)."""
    parameters = [p.detach() for p in model.parameters()]
    return sum(local(p).numel() for p in parameters), sum(p.numel() for p in parameters)
