"""An LLM whose sizes come from a Plan: planned first, refused before anything is loaded when it does not fit."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qwenfit.config import ModelConfig
from qwenfit.errors import DoesNotFit, UsageError
from qwenfit.hardware import Device
from qwenfit.planning.planner import plan, this_device
from qwenfit.planning.render import size
from qwenfit.planning.task import Inference, check_count
from qwenfit.planning.types import Plan

if TYPE_CHECKING:
    from qwenfit.engine.llm import LLM

DEFAULT_CONTEXT = 4096
BLOCK_SIZE = 16


@dataclass(frozen=True)
class RunOptions:
    """What the running verbs share. `context` None: the model's own, but no more than 4,096 tokens by default."""

    model: str
    precision: str | None = None
    head_precision: str | None = None
    adapter: str | None = None  # a LoRA folder in PEFT's format
    kv_cache: str | None = None
    context: int | None = None
    batch: int = 1
    device: str | None = None  # "cpu" | "cuda"
    random_weights: bool = False
    seed: int = 0
    force: bool = False  # load although the plan says that it does not fit


def run_device(name: str | None) -> Device:
    """The device to run on: as named, else the detected NVIDIA GPU with the most free memory, else the CPUs.

    UsageError for a GPU that the installed torch cannot use: it is never left aside in silence.
    """
    from qwenfit.detect import cpu_host, detect_hardware

    if name is None:
        device = this_device()
        return cpu_host() if device.kind == "unified" else _usable(device)  # Apple's GPU is planned for, not run on
    if name == "cpu":
        return cpu_host()
    if name.split(":")[0] != "cuda":
        raise UsageError(f"There is no device {name!r}.", "--device cpu or --device cuda")
    gpus = [d for d in detect_hardware() if d.kind == "gpu"]
    if not gpus:
        raise UsageError("No CUDA device was found on this machine.", "qwenfit doctor")
    return _usable(gpus[0])


def _usable(device: Device) -> Device:
    if device.kind != "gpu":
        return device
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            f"This machine has {device.name}, which the installed torch {torch.__version__} cannot use.",
            "Install torch with CUDA (pytorch.org says how), or take the CPU: --device cpu",
        )
    return device


def plan_run(options: RunOptions) -> Plan:
    """The plan of a run on this machine. Raises DoesNotFit, with what would fit, unless forced."""
    from qwenfit.planning.planner import resolve

    config = resolve(options.model)
    context = min(config.context_length, DEFAULT_CONTEXT) if options.context is None else options.context
    check_count("context", context, least=2)
    generate = max(1, min(2048, context // 2))
    made = plan(
        config,
        gpu=run_device(options.device),
        precision=options.precision,
        kv_cache=options.kv_cache or default_cache(options.precision),
        head_precision=options.head_precision,
        prompt=context - generate,
        generate=generate,
        batch=options.batch,
    )
    made = replace(made, spec=options.model)  # what the commands it prints name
    if not made.fits and not options.force:
        raise DoesNotFit(_does_not_fit(made), _what_would(made))
    return made


def has_files(model: ModelConfig) -> bool:
    """Whether the weights lie on this machine: their headers were read from files."""
    return bool(model.tensors) and all(tensor.file for tensor in model.tensors or ())


def default_cache(precision: str | None) -> str:
    return "fp32" if precision == "fp32" else "bf16"


def _does_not_fit(made: Plan) -> str:
    device = made.hardware.device
    parts = ", ".join(
        f"{part.replace('_', ' ')} {getattr(made.memory, part) / 1e9:.1f}"
        for part in ("weights", "kv_cache", "activations", "context")
        if getattr(made.memory, part) > 5e7
    )
    return (
        f"{made.model.name} in {made.precision} needs {size(made.memory.process)} and {device.name} has "
        f"{size(made.capacity)} free ({parts} GB)."
    )


def _what_would(made: Plan) -> str:
    ways = [f"{a.what} ({a.process_bytes / 1e9:.1f} GB)" for a in made.advice if a.process_bytes is not None]
    return "; ".join(ways) if ways else "a smaller model: qwenfit plan shows what fits here"


def load_planned(options: RunOptions, progress: Callable[[int, int], None] | None = None) -> tuple[LLM, Plan]:
    """Plan, check, load. The engine's cache is what the plan says: `batch` requests of `context` tokens."""
    made = plan_run(options)
    if options.adapter is not None:
        from qwenfit.tune.fingerprint import other_base
        from qwenfit.tune.peft_format import read_config

        read_config(options.adapter)  # before the weights are read
        if has_files(made.model) and (text := other_base(options.adapter, made.model)):
            print(text, file=sys.stderr, flush=True)
    from qwenfit.engine.llm import LLM

    task = made.task
    assert isinstance(task, Inference)
    context = task.context
    blocks = options.batch * -(-context // BLOCK_SIZE)
    llm = LLM(
        made.model if has_files(made.model) else options.model,  # its headers are read already
        precision=made.precision,
        head_precision=options.head_precision,
        adapter=options.adapter,
        device="cpu" if made.hardware.device.kind == "cpu" else "cuda",
        random_weights=options.random_weights,
        seed=options.seed,
        progress=progress,
        kv_cache=task.kv_cache,
        max_model_len=context,
        max_num_seqs=options.batch,
        num_blocks=blocks,
    )
    return llm, made


def stderr_progress(what: str) -> Callable[[int, int], None] | None:
    """A progress bar on stderr, or None where stderr is no terminal."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(what, total=None)
    bar.start()

    def update(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    return update
