"""`qwenfit doctor --network`: the link between the processes of a torchrun, and whether ZeRO-3 over it makes sense.

The guide: test the throughput first, since ZeRO-3 sends every weight twice a micro-batch.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from qwenfit.config import ModelConfig
from qwenfit.hardware import Device, Hardware
from qwenfit.planning.constants import read
from qwenfit.planning.finetune_speed import finetune_speed
from qwenfit.planning.planner import choose_precision, resolve
from qwenfit.planning.stack import get_stack
from qwenfit.planning.task import Finetune

if TYPE_CHECKING:
    from qwenfit.tune.world import World

SIZES = (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 26)  # bytes a collective moves
TRIALS = 5
SLOW_SHARE = 0.5  # of a step on the link: beyond it the link takes longer than computing, which could hide it
DEFAULT_MODEL = "Qwen-7B"
COMMAND = "torchrun --nproc-per-node {gpus}{nodes} -m qwenfit doctor --network"
NODES = " --nnodes NODES --node-rank $NODE_RANK --master-addr $MASTER_ADDR"


@dataclass(frozen=True)
class Link:
    """One collective of `size` bytes over all processes: the median time and the rate that each link carried.

    `bus` is in bytes/s: size / seconds times the share that crosses each link, 2 (n-1) / n for an all-reduce and
    (n-1) / n for an all-gather (nccl-tests, PERFORMANCE.md).
    """

    operation: str
    size: int
    seconds: float
    bus: float


def measure_links(world: World, sizes: tuple[int, ...] = SIZES, trials: int = TRIALS) -> list[Link]:
    """Time all-reduce and all-gather between the processes; every process must call it, and gets equal results."""
    import torch
    import torch.distributed as dist

    found = []
    share = (world.size - 1) / world.size
    for size in sizes:
        whole = torch.ones(size // 2, dtype=torch.bfloat16, device=world.device)
        part = torch.ones(-(-len(whole) // world.size), dtype=torch.bfloat16, device=world.device)
        gathered = torch.empty(len(part) * world.size, dtype=torch.bfloat16, device=world.device)
        seconds = _median(world, functools.partial(dist.all_reduce, whole), trials)
        found.append(Link("all-reduce", size, seconds, 2 * share * size / seconds))
        gather = functools.partial(_all_gather(), gathered, part)
        seconds = _median(world, gather, trials)
        found.append(Link("all-gather", size, seconds, share * gathered.nbytes / seconds))
    return found


def _all_gather() -> Callable[..., object]:
    """torch 2.13 renamed it."""
    import torch.distributed as dist

    work: Callable[..., object] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return work


def _median(world: World, work: Callable[[], object], trials: int) -> float:
    """Median seconds of the slowest process."""
    import torch
    import torch.distributed as dist

    times = []
    for _ in range(trials + 1):
        dist.barrier()
        _wait(world)
        started = time.perf_counter()
        work()
        _wait(world)
        longest = torch.tensor(time.perf_counter() - started, device=world.device)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        times.append(float(longest))
    return sorted(times[1:])[trials // 2]  # the first one sets the connections up


def _wait(world: World) -> None:
    if world.device.type == "cuda":
        import torch

        torch.cuda.synchronize(world.device)


@dataclass(frozen=True)
class Sense:
    """ZeRO-3 of full finetuning over a measured link: seconds of one optimizer step, and those spent on the link."""

    model: str
    seconds: float
    link: float
    zero2_link: float

    @property
    def worth(self) -> bool:
        return self.link <= SLOW_SHARE * self.seconds

    def text(self) -> str:
        share = self.link / self.seconds
        text = (
            f"ZeRO-3 of {self.model} (full, 1024 tokens, 8 micro-batches): {self.seconds:.2f} s per step, "
            f"{share:.0%} of it on this link; ZeRO-2 would spend {self.zero2_link:.2f} s on it. "
        )
        if self.worth:
            return text + "It makes sense."
        return text + "It does not make sense: use ZeRO-2 if the weights fit (--zero 2), or a faster link."


def sense_of(model: ModelConfig, device: Device, size: int, bus: float) -> Sense:
    """The plan's own time of a step (`finetune_speed`) with `bus` bytes/s, as measured, between `size` devices."""
    task = Finetune(method="full")
    stack = get_stack("qwenfit")
    # The plan takes a share of a link's peak; this is already what collectives reach.
    measured = replace(device, link_bandwidth=bus / read("link_share"))
    hardware = Hardware(measured, gpus=size)
    precision = choose_precision(model, task, device, None)
    third = finetune_speed(model, hardware, task, precision, stack, 3)
    second = finetune_speed(model, hardware, task, precision, stack, 2)
    assert third.seconds_per_iter is not None
    return Sense(model.name, third.seconds_per_iter, third.terms["link"], second.terms["link"])


def network(model: str | None, as_json: bool, echo: Callable[[str], None]) -> int:
    """Measure under torchrun and say what it means for `model`; without torchrun say what to type. Returns 0."""
    from qwenfit.run.planned import run_device
    from qwenfit.tune.distributed import together
    from qwenfit.tune.processes import processes

    device = run_device(None)
    config = resolve(model or DEFAULT_MODEL)
    if processes()[1] == 1:
        echo(instructions(device))
        return 0

    def measure(world: World) -> int:
        links = measure_links(world)
        if world.rank == 0:
            best = max(link.bus for link in links if link.operation == "all-gather")
            sense = sense_of(config, device, world.size, best)
            echo(as_text(links, sense, world.size) if not as_json else _as_json(links, sense, world.size))
        return 0

    return together("cpu" if device.kind == "cpu" else "cuda", measure)


def instructions(device: Device) -> str:
    """The commands that measure: on one host, and on each of several."""
    gpus = 2
    if device.kind != "cpu":
        import torch

        gpus = max(2, torch.cuda.device_count())
    here, each = COMMAND.format(gpus=gpus, nodes=""), COMMAND.format(gpus=gpus, nodes=NODES)
    return f"A link needs two ends. On one host:\n  {here}\nOn several, in each:\n  {each}"


def as_text(links: list[Link], sense: Sense, size: int) -> str:
    """A table, a line a size and collective, and the verdict."""
    rows = [f"{size} processes", f"{'':<12}{'bytes':>12}{'time':>12}{'per link':>14}"]
    for link in links:
        rows.append(f"{link.operation:<12}{link.size:>12,}{link.seconds * 1e6:>9,.0f} us{link.bus / 1e9:>9.2f} GB/s")
    latency = min(link.seconds for link in links)
    return "\n".join([*rows, f"Latency: {latency * 1e6:,.0f} us.", sense.text()])


def _as_json(links: list[Link], sense: Sense, size: int) -> str:
    table = {"processes": size, "links": [asdict(link) for link in links]}
    return json.dumps(table | {"zero3": asdict(sense) | {"worth": sense.worth}}, indent=2)
