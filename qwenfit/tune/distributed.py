"""Several processes that train together, started by torchrun: how they join, and what happens when one fails.

They hold copies of the network (`group.py`), shards of it by torch's fully_shard (`shards.py`), or what DeepSpeed
makes of it (`deepspeed.py`).
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from qwenfit.errors import QwenfitError, UsageError
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.group import Group
from qwenfit.tune.processes import launched
from qwenfit.tune.watch import Watch
from qwenfit.tune.world import World

TIMEOUT = timedelta(minutes=30)  # of a collective: rank 0 may be writing a large checkpoint meanwhile


def zero_stage(config: TuneConfig, size: int) -> int:
    """0 (a copy on every process), 2 or 3: as asked, else full 3, adapters 2, and Q-LoRA 0.

    Raises UsageError for what cannot be sharded.
    """
    stage = config.zero
    if stage is None:
        stage = {"full": 3, "qlora": 0}.get(config.method or "lora", 2)
    if config.method == "qlora" and (config.deepspeed or (size > 1 and stage)):
        raise UsageError(
            "Int4 and int8 weights are packed and cannot be sharded; Q-LoRA trains with a copy on each GPU.", "--zero 0"
        )
    if config.new_tokens and (config.deepspeed or (size > 1 and stage)):
        raise UsageError("Single rows of a sharded embedding cannot be trained.", "--zero 0, or --method lora-emb.")
    if config.deepspeed and not stage:
        raise UsageError("DeepSpeed is here for ZeRO: copies need none.", "--zero 2 or 3, or leave --deepspeed out.")
    return stage


class Joined(Group):
    """Processes that have met and do not know yet what they train."""

    def configured(self, config: TuneConfig) -> World:
        stage = zero_stage(config, self.size)
        if config.deepspeed:
            from qwenfit.tune.deepspeed import DeepSpeedShards

            return DeepSpeedShards(self.device, self.watch, config, stage)
        if stage and (self.size > 1 or config.zero):
            from qwenfit.tune.shards import Shards

            return Shards(self.device, self.watch, stage)
        return Group(self.device, self.watch)


def device_of(kind: str) -> str:
    """The device of this process: its own GPU, or the CPU. Raises UsageError when the host has too few GPUs."""
    if kind == "cpu":
        return "cpu"
    if not launched():
        return "cuda"
    index = int(os.environ.get("LOCAL_RANK", "0"))
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
    if not launched():
        return work(World(kind))
    try:
        group = _join(kind)
        code = _told(group, work)
    except QwenfitError as error:
        code = _show(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _join(kind: str) -> Joined:
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
    return Joined(device, watch)


def _told(group: Group, work: Callable[[World], int]) -> int:
    try:
        code = work(group)
        dist.barrier()
    except QwenfitError as error:
        code = _show(error)  # before the others are told: torchrun ends this process when the first of them ends
        group.watch.fail(error.message, error.hint or "")
        return code
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
    print(f"error: rank {rank}: {error.message}{hint}", file=sys.stderr, flush=True)
    return error.exit_code
