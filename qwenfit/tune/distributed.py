"""Several processes that train together, started by torchrun: copies of the network (DDP), or shards of it (ZeRO).

ZeRO (arXiv 1910.02054) is torch's fully_shard: stage 3 gathers each block's weights for its forward and again for its
backward pass; stage 2 keeps them gathered from a step's first micro-batch to its last. In both, each process keeps its
part alone of weights, gradients and optimizer states between steps.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from qwenfit.errors import NotFound, QwenfitError, UsageError
from qwenfit.model.transformer import Transformer
from qwenfit.tune.batch import TrainBatch
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.forward import batch_loss
from qwenfit.tune.optimizer import AdamW, local
from qwenfit.tune.processes import processes
from qwenfit.tune.watch import Watch
from qwenfit.tune.world import World

TIMEOUT = timedelta(minutes=30)  # of a collective: rank 0 may be writing a large checkpoint meanwhile
BUCKET_ELEMENTS = 1 << 24  # gradients that are summed in one all-reduce


def zero_stage(config: TuneConfig, size: int) -> int:
    """0 (a copy on every process), 2 or 3: as asked, else full 3, adapters 2, and Q-LoRA 0.

    Raises UsageError for what cannot be sharded.
    """
    stage = config.zero
    if stage is None:
        stage = {"full": 3, "qlora": 0}.get(config.method or "lora", 2)
    if size > 1 and stage and config.method == "qlora":
        raise UsageError(
            "Int4 and int8 weights are packed and cannot be sharded; Q-LoRA trains with a copy on each GPU.", "--zero 0"
        )
    if size > 1 and stage and config.new_tokens:
        raise UsageError("Single rows of a sharded embedding cannot be trained.", "--zero 0, or --method lora-emb.")
    return stage


def device_of(kind: str) -> str:
    """The device of this process: its own GPU, or the CPU. Raises UsageError when the host has too few GPUs."""
    if kind == "cpu":
        return "cpu"
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if processes()[1] == 1:
        return "cuda"
    if index >= torch.cuda.device_count():
        raise UsageError(
            f"Process {index} of this host has no GPU: there are {torch.cuda.device_count()}.",
            f"torchrun --nproc-per-node {max(1, torch.cuda.device_count())}",
        )
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def together(kind: str, work: Callable[[World], int]) -> int:
    """Run `work` in this process and, under torchrun, with all the others; returns its exit code.

    kind: "cpu" or "cuda". Under torchrun the process ends here: a failure is told to the other processes, which end
    too and name it, and the interpreter is left without its finalisation, in which gloo's threads may abort.
    """
    if processes()[1] == 1:
        return work(World(kind))
    try:
        group = _join(kind)
        code = _told(group, work)
    except QwenfitError as error:
        code = _show(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join(kind: str) -> Group:
    device = device_of(kind)
    backend = "gloo" if device == "cpu" else "nccl"
    index = None if device == "cpu" else torch.device(device)
    dist.init_process_group(backend, timeout=TIMEOUT, device_id=index)
    watch = Watch(dist.get_rank(), dist.get_world_size())

    def terminated(*_: Any) -> None:
        """torchrun sends SIGTERM when another process has died: there is time to say which."""
        watch.blame()
        os._exit(143)

    signal.signal(signal.SIGTERM, terminated)  # while training, StopSignals takes it
    return Group(device, watch)


def _told(group: Group, work: Callable[[World], int]) -> int:
    try:
        code = work(group)
        dist.barrier()
    except QwenfitError as error:
        group.watch.fail(error.message)
        return _show(error)
    except Exception as error:
        if isinstance(error, dist.DistError) or type(error) is RuntimeError:
            group.watch.blame()  # another process's end looks like this from here
        traceback.print_exc()
        group.watch.fail(f"{type(error).__name__}: {error}")
        return 1
    group.watch.close()
    return code


def _show(error: QwenfitError) -> int:
    rank = os.environ.get("RANK", "0")
    hint = f"\n  try: {error.hint}" if error.hint else ""
    print(f"error: rank {rank}: {error.message}{hint}", file=sys.stderr)
    return error.exit_code


class Group(World):
    """The processes of one torchrun. Copies or shards, as `stage` says (0, 2 or 3)."""

    def __init__(self, device: str, watch: Watch) -> None:
        super().__init__(device)
        self.watch = watch
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.stage = 0
        self.step: _Step | None = None
        self.sync_once = False
        self.messages = 0

    def configure(self, config: TuneConfig) -> None:
        self.stage, self.step = zero_stage(config, self.size), None
        self.sharded = self.stage > 0

    def describe(self, model: Transformer) -> str:
        mine, total = held(model)
        way = f"shards of the network (ZeRO-{self.stage})" if self.sharded else "copies of the network"
        return f"{self.size} processes with {way}: {mine:,} of {total:,} parameters each."

    def prepare(self, model: Transformer) -> None:
        if not self.sharded:
            return
        trained = [p for p in model.parameters() if p.requires_grad]
        # Adapters' gradients are small: they add up whole and are summed once a step. Those of whole weights are
        # scattered after every micro-batch, since holding them whole is what sharding is there to avoid.
        self.sync_once = 4 * sum(p.numel() for p in trained) < sum(p.numel() for p in model.parameters())
        self.step = shard(model, self.device, self.stage)
        assert_sharded(model, self.size)

    def loss(self, model: Transformer, batch: TrainBatch, divisor: float, *, last: bool = True, **how: Any) -> Tensor:
        if self.step is None:
            return batch_loss(model, batch, divisor, **how)
        assert isinstance(self.step, FSDPModule)
        self.step.set_requires_gradient_sync(last or not self.sync_once)
        self.step.set_reshard_after_backward(last or self.stage == 3)
        loss: Tensor = self.step(batch, divisor, how)
        return loss

    def total(self, value: float) -> float:
        tensor = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return float(tensor)

    def sum_gradients(self, optimizer: AdamW) -> None:
        if self.sharded:  # fully_shard did in the backward pass
            return
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

    def gradient_norm(self, optimizer: AdamW) -> float:
        mine = float(optimizer.gradient_norm())
        return float(self.total(mine * mine) ** 0.5) if self.sharded else mine

    def gather(self, value: Any) -> list[Any]:
        self.messages += 1
        return self.watch.exchange(f"gather-{self.messages}", value)

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

    @contextmanager
    def whole(self, model: Transformer) -> Iterator[None]:
        """As in World: a trained parameter's shards are gathered one after the other, and lie on rank 0's host."""
        sharded: dict[str, nn.Parameter] = {}
        if self.step is not None:
            for module in self.step.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            for name, parameter in list(model.named_parameters()):
                if parameter.requires_grad:
                    full = parameter.detach().full_tensor()  # type: ignore[attr-defined]
                    if self.rank == 0:
                        sharded[name] = parameter
                        _put(model, name, nn.Parameter(full.cpu()))
        try:
            yield
        finally:
            for name, parameter in sharded.items():
                _put(model, name, parameter)


class _Step(nn.Module):
    """The root of a sharded network: its forward pass is a micro-batch's loss, with embedding and head gathered."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: TrainBatch, divisor: float, how: dict[str, Any]) -> Tensor:
        model = self.model
        assert isinstance(model, Transformer)
        return batch_loss(model, batch, divisor, **how)


def shard(model: Transformer, device: torch.device, stage: int) -> _Step:
    """Shard every block, and the rest as one unit, over all processes; gradients are summed, in float32."""
    # The mesh names its device: fully_shard would take the GPU of a host that has one (pytorch#132471).
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=stage == 3)
    step = _Step(model)
    fully_shard(step, mesh=mesh, mp_policy=policy, reshard_after_forward=False)  # the backward pass begins with it
    for module in step.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)  # the loss is divided by the trained tokens of all processes
    return step


def assert_sharded(model: Transformer, size: int) -> None:
    """Raises RuntimeError unless each process really holds 1 / size of every parameter, in rows rounded up."""
    for name, parameter in model.named_parameters():
        rows = -(-parameter.shape[0] // size)
        most = rows * (parameter.numel() // parameter.shape[0])
        if not hasattr(parameter, "to_local") or local(parameter.detach()).numel() > most:
            raise RuntimeError(f"{name} is not sharded: a process holds more than {most} of {parameter.numel()}")


def held(model: Transformer) -> tuple[int, int]:
    """(parameters that this process holds, parameters in all)."""
    parameters = [p.detach() for p in model.parameters()]
    return sum(local(p).numel() for p in parameters), sum(p.numel() for p in parameters)


def _put(model: Transformer, name: str, parameter: nn.Parameter) -> None:
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
