"""plan(): one Plan from a model, hardware and a task."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from qwenfit.catalog import find_model
from qwenfit.config import ModelConfig
from qwenfit.errors import UsageError
from qwenfit.hardware import Device, Hardware, capability_notes, find_device
from qwenfit.planning.checks import check_context, check_precision, check_task
from qwenfit.planning.command import command_for, runs_elsewhere
from qwenfit.planning.finetune_memory import finetune_memory, zero_stage
from qwenfit.planning.finetune_speed import finetune_speed
from qwenfit.planning.inference_memory import inference_memory, uses_flash_attention
from qwenfit.planning.inference_speed import inference_speed
from qwenfit.planning.stack import Stack, get_stack
from qwenfit.planning.task import (
    FINETUNE_METHODS,
    PRECISIONS,
    TASKS,
    Finetune,
    Inference,
    Task,
    check_choice,
    check_count,
)
from qwenfit.planning.types import DOES_NOT_FIT, FITS, TIGHT, Memory, Plan
from qwenfit.planning.weights import check_tensor_parallel, native_precision

TIGHT_SHARE = 0.95  # of the usable memory: above it the plan's own uncertainty could make the run fail
MAX_DEVICES = 4096
INFERENCE_FIELDS = ("prompt", "generate", "batch", "shared_prefix", "kv_cache", "head_precision", "flash_attention")
FINETUNE_FIELDS = (
    "seq_len",
    "micro_batch",
    "grad_accum",
    "lora_rank",
    "optimizer",
    "checkpointing",
    "fused_loss",
    "zero",
)


def plan(
    model: str | ModelConfig,
    task: str | Task = "inference",
    *,
    gpu: str | Device | None = None,
    gpus: int = 1,
    nodes: int = 1,
    network_gbps: float | None = None,
    precision: str | None = None,
    stack: str = "qwenfit",
    parallel: str | None = None,
    context: int | None = None,
    host_factor: float = 1.0,
    advise: bool = True,
    **sizes: Any,
) -> Plan:
    """The memory, speed, verdict and command of `model` doing `task` on `gpus` devices on each of `nodes` hosts.

    `gpu` None plans for this machine's fastest device. `context` sets prompt + generate for inference (the answer
    keeps its length where it fits) and seq_len for finetuning. `sizes` are the fields of Inference or Finetune.
    `host_factor` is this host's launch time relative to the guide's host (2 = twice as slow).
    Raises UsageError, NotFound or BadFile with one sentence; a plan that does not fit is returned, not raised.
    """
    config = resolve(model) if isinstance(model, str) else model
    the_stack = get_stack(stack)
    the_task = task if isinstance(task, Inference | Finetune) else make_task(task, context, sizes)
    hardware = make_hardware(gpu, gpus, nodes, network_gbps)
    chosen = choose_precision(config, the_task, hardware.device, precision)
    check_context(config, the_task)
    check_host_factor(host_factor)
    made = build_plan(config, hardware, the_task, chosen, the_stack, parallel, host_factor, spec=_spec(model))
    if not advise:
        return made
    from qwenfit.planning.advice import advice_for

    return replace(made, advice=advice_for(made))


def resolve(spec: str) -> ModelConfig:
    """The catalog's model for a bare name (quick: no file reader is imported), else whatever `spec` names."""
    if not os.path.exists(spec) and (config := find_model(spec)) is not None:
        return config
    from qwenfit.checkpoint.resolve import resolve_model

    return resolve_model(spec)


def _spec(model: str | ModelConfig) -> str:
    return model if isinstance(model, str) else model.name


def make_task(name: str, context: int | None, sizes: dict[str, Any]) -> Task:
    """An Inference or Finetune from a task name and its sizes; UsageError for a size the task does not have."""
    name = name.replace("_", "-").lower()
    check_choice("task", name, TASKS)
    sizes = {key: value for key, value in sizes.items() if value is not None}
    allowed = FINETUNE_FIELDS if name in FINETUNE_METHODS else INFERENCE_FIELDS
    for key in sizes:
        if key not in allowed:
            raise UsageError(f"The task {name} has no {key}.", f"It has {', '.join(allowed)}.")
    if context is not None:
        check_count("context", context, least=2)
        if name in FINETUNE_METHODS:
            sizes["seq_len"] = context
        else:
            _fill_context(context, sizes)
    if name in FINETUNE_METHODS:
        return Finetune(method=name, **sizes)
    return Inference(**sizes)


def _fill_context(context: int, sizes: dict[str, Any]) -> None:
    """Sets prompt and generate so that they sum to `context`; UsageError when those given cannot."""
    given = {key: check_count(key, sizes[key]) for key in ("prompt", "generate") if key in sizes}
    if "prompt" not in given:
        sizes.setdefault("generate", min(2048, context - 1))
        sizes["prompt"] = context - sizes["generate"]
    elif "generate" not in given:
        sizes["generate"] = context - sizes["prompt"]
    if sizes["prompt"] < 1 or sizes["generate"] < 1 or sizes["prompt"] + sizes["generate"] != context:
        words = " and ".join(f"{key} {value}" for key, value in given.items())
        raise UsageError(
            f"A context of {context} tokens, prompt and answer together, contradicts {words}.",
            "Give --context, or --prompt and --generate.",
        )


def check_host_factor(value: float) -> float:
    """`value` if it can be a ratio of launch times; UsageError otherwise."""
    if not 0 < value <= 1000:
        raise UsageError(f"host_factor must be above 0 and at most 1000, not {value}.")
    return value


def make_hardware(
    gpu: str | Device | None, gpus: int = 1, nodes: int = 1, network_gbps: float | None = None
) -> Hardware:
    """`gpus` of a named, given or (None) this machine's device on each of `nodes` hosts; UsageError when absurd."""
    check_count("gpus", gpus)
    check_count("nodes", nodes)
    if gpus * nodes > MAX_DEVICES:
        raise UsageError(f"{gpus * nodes} devices are more than the {MAX_DEVICES} that a plan handles.")
    if network_gbps is not None and not 0 < network_gbps <= 1e5:
        raise UsageError(f"network_gbps must be between 0 and 100000 Gb/s, not {network_gbps}.")
    device = this_device(gpus) if gpu is None else find_device(gpu) if isinstance(gpu, str) else gpu
    if device.kind in ("cpu", "unified") and gpus * nodes > 1:
        raise UsageError(f"A plan on {device.name} is for one machine.", "Leave --gpus and --nodes at 1.")
    network = None if network_gbps is None else network_gbps * 1e9 / 8
    return Hardware(device, gpus, nodes, network)


def this_device(gpus: int = 1) -> Device:
    """The device a plan uses when none is named: the detected GPU with the most free memory, else this CPU.

    Of several equal GPUs the one with the least free memory: all must hold their part. UsageError when fewer are here.
    """
    from qwenfit.detect import detect_hardware

    devices = detect_hardware()
    found = [d for d in devices if d.kind != "cpu"]
    if not found:
        return max(devices, key=lambda d: d.usable_bytes)
    kinds: dict[str, list[Device]] = {}
    for device in sorted(found, key=lambda d: -d.usable_bytes):
        kinds.setdefault(device.name, []).append(device)
    enough = [same[gpus - 1] for same in kinds.values() if len(same) >= gpus]
    if not enough:
        here = ", ".join(f"{len(same)} x {name}" for name, same in kinds.items())
        raise UsageError(f"This machine has {here}, not {gpus} GPUs of a kind.", "Name the card: --gpu NAME")
    return max(enough, key=lambda d: d.usable_bytes)


def choose_precision(config: ModelConfig, task: Task, device: Device, asked: str | None) -> str:
    """The precision to plan: as asked, else the checkpoint's; fp16 for bf16 where the device has no bf16."""
    if asked is not None:
        check_choice("precision", asked, PRECISIONS)
    if isinstance(task, Finetune) and task.method == "qlora":
        wanted = asked or (native_precision(config) if config.quantization else "int4")
        if wanted not in ("int8", "int4"):
            raise UsageError(f"Q-LoRA trains adapters on int8 or int4 weights, not {wanted}.", "Use --task lora.")
        return wanted
    wanted = asked or native_precision(config)
    if isinstance(task, Finetune) and wanted in ("int8", "int4"):
        if asked is not None or config.quantization is not None:
            raise UsageError(
                f"{wanted} weights cannot be trained by {task.method}.", "Use --task qlora, or a 16-bit checkpoint."
            )
        wanted = "bf16"
    if isinstance(task, Finetune) and wanted == "fp32":
        if asked is not None:
            raise UsageError(
                "Finetuning computes in 16 bits; float32 is for the master weights.", "Use --precision bf16."
            )
        wanted = "bf16"
    if wanted == "bf16" and not device.bf16 and device.kind != "cpu":
        wanted = "fp16"
    return wanted


def _usable_cache(task: Inference, precision: str, device: Device) -> Inference:
    if task.kv_cache == "bf16" and (precision == "fp16" or (not device.bf16 and device.kind != "cpu")):
        return replace(task, kv_cache="fp16")
    return task


def choose_parallel(
    config: ModelConfig, hardware: Hardware, task: Task, precision: str, stack: Stack, asked: str | None
) -> str:
    """How several devices share the work: as asked, else what the stack does."""
    if isinstance(task, Finetune):
        if asked is not None:
            raise UsageError("Finetuning over several GPUs is chosen by --zero (0, 2 or 3), not --parallel.")
        if hardware.world_size == 1:
            return "single"
        return {0: "data", 2: "zero2", 3: "zero3"}[zero_stage(task, stack, hardware.world_size)]
    if asked is not None:
        check_choice("parallel", asked, ("layers", "tensor"))
    if hardware.world_size == 1:
        return "single"
    if asked == "tensor":
        check_tensor_parallel(config, hardware.world_size, precision)
        return "tensor"
    if hardware.world_size > config.num_layers:
        raise UsageError(f"{config.name} has {config.num_layers} layers, fewer than {hardware.world_size} devices.")
    if asked is None and stack.tensor_parallel:
        try:
            check_tensor_parallel(config, hardware.world_size, precision)
        except UsageError:
            return "layers"
        return "tensor"
    return "layers"


def build_plan(
    config: ModelConfig,
    hardware: Hardware,
    task: Task,
    precision: str,
    stack: Stack,
    parallel: str | None = None,
    host_factor: float = 1.0,
    spec: str = "",
) -> Plan:
    """The arithmetic, with everything decided: no detection, no files."""
    if isinstance(task, Inference):
        task = _usable_cache(task, precision, hardware.device)
    check_task(hardware.device, task, stack)
    check_precision(config, precision)
    way = choose_parallel(config, hardware, task, precision, stack, parallel)
    if isinstance(task, Inference):
        devices = inference_memory(config, hardware, task, precision, stack, way)
        speed = inference_speed(config, hardware, task, precision, stack, way, host_factor)
    else:
        stage = zero_stage(task, stack, hardware.world_size)
        devices = finetune_memory(config, hardware, task, precision, stack, stage)
        speed = finetune_speed(config, hardware, task, precision, stack, stage, host_factor)
    fullest = max(devices, key=lambda m: m.process)
    capacity = hardware.device.usable_bytes
    made = Plan(
        model=config,
        hardware=hardware,
        task=task,
        precision=precision,
        stack=stack.name,
        parallel=way,
        memory=fullest,
        memory_per_device=devices,
        speed=speed,
        verdict=verdict(fullest, capacity, stack),
        capacity=capacity,
        command="",
        spec=spec or config.name,
        asked_parallel=parallel,
        host_factor=host_factor,
        notes=(*capability_notes(hardware.device), *_task_notes(task, stack, hardware.device)),
    )
    return replace(made, command=command_for(made), notes=(*made.notes, *_engine_notes(made)))


def _engine_notes(plan: Plan) -> tuple[str, ...]:
    """Where this project's own engine and trainer do not run what is planned for them."""
    device = plan.hardware.device
    if plan.stack != "qwenfit":
        return ()
    if device.kind != "cpu" and device.vendor != "nvidia":
        return (f"qwenfit runs on NVIDIA GPUs and on CPUs; on {device.name} this is what the hardware would allow.",)
    if runs_elsewhere(plan):
        return ("qwenfit's own engine works on one device: this is run by vLLM, which --stack vllm plans.",)
    return ()


def verdict(memory: Memory, capacity: int, stack: Stack) -> str:
    """fits, tight (less than 5 % left) or does not fit. vLLM must fit into its share of the card."""
    if stack.utilization is not None:
        return FITS if memory.process <= int(stack.utilization * capacity) else DOES_NOT_FIT
    if memory.process > capacity:
        return DOES_NOT_FIT
    return TIGHT if memory.process > TIGHT_SHARE * capacity else FITS


def _task_notes(task: Task, stack: Stack, device: Device) -> tuple[str, ...]:
    if not isinstance(task, Inference):
        return ()
    notes = []
    if task.kv_cache == "int8" and not stack.kv_int8_with_flash:
        notes.append(
            f"{stack.name}: the int8 KV cache switches FlashAttention off (a limit of that software, not of the idea)."
        )
    elif device.flash_attention and not uses_flash_attention(task, stack, device):
        notes.append(f"{stack.name} runs without FlashAttention here.")
    if task.shared_prefix and not stack.paged:
        notes.append(f"{stack.name} has no paged cache: every request keeps its own copy of the shared prefix.")
    return tuple(notes)
