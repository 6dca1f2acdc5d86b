"""The plan a run is held to: made and checked before weights are read, and asked again when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import TracebackType

from qwenfit.config import ModelConfig
from qwenfit.errors import DoesNotFit, QwenfitError, UsageError
from qwenfit.planning.advice import advice_for
from qwenfit.planning.finetune_memory import checkpoint_bytes, trainable, zero_stage
from qwenfit.planning.finetune_qwenfit import largest_pass
from qwenfit.planning.finetune_speed import finetune_speed
from qwenfit.planning.planner import plan, resolve, verdict
from qwenfit.planning.render import size
from qwenfit.planning.stack import get_stack
from qwenfit.planning.task import Finetune
from qwenfit.planning.types import Memory, Plan
from qwenfit.run.planned import run_device
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.processes import processes

# The source files whose frames an out-of-memory error came through, innermost meaning, and the plan's term for each.
_TERMS = (("optimizer.py", "optimizer"), ("loss.py", "logits"), ("forward.py", "activations"), ("load.py", "weights"))


def plan_tune(config: TuneConfig) -> Plan:
    """The plan of a run on this machine. Raises DoesNotFit, with what would fit, unless forced; UsageError."""
    model = resolve(config.model)
    method = config.method or "lora"
    _check_method(model, method, config)
    wide = config.precision == "fp32"
    device = run_device(config.device)
    if config.offload and device.kind == "cpu":
        raise UsageError(
            "Offload moves activations from a GPU to host memory; this run is on the CPU.", "Leave --offload out."
        )
    # Processes on CPUs are planned one by one, as if each had a copy: they share what the host has.
    local, total = (1, 1) if device.kind == "cpu" else processes()
    made = plan(
        model if config.model == model.name else config.model,
        Finetune(
            method=method,
            seq_len=config.seq_len,
            micro_batch=config.micro_batch,
            grad_accum=config.grad_accum,
            lora_rank=config.lora_rank,
            optimizer=config.optimizer,
            checkpointing=config.keep != "all",
            zero=config.zero,
        ),
        gpu=device,
        gpus=local,
        nodes=-(-total // local),
        precision=None if wide else config.precision,
        advise=False,
    )
    if made.precision == "fp16":
        raise UsageError(
            f"{made.hardware.device.name} has no bf16, and fp16 training is not done: its gradients need a scale.",
            "Use a card with bf16 (Ampere or later), or --precision fp32.",
        )
    made = _as_configured(made, config)
    if not made.fits and not config.force:
        raise DoesNotFit(_does_not_fit(made), _what_would(made))
    return made


def _check_method(model: ModelConfig, method: str, config: TuneConfig) -> None:
    if model.quantization is not None and method != "qlora":
        raise UsageError(
            f"{model.name} holds int{model.quantization.bits} weights, which {method} cannot train.",
            "--method qlora, or the 16-bit checkpoint.",
        )
    packed = config.precision in ("int4", "int8")
    if packed and method != "qlora":
        raise UsageError(f"{config.precision} weights cannot be trained by {method}.", "--method qlora")
    if method == "qlora" and config.precision is not None and not packed:
        raise UsageError(
            f"Q-LoRA trains adapters beside int4 or int8 weights, not {config.precision}.",
            "--precision int4, or --method lora",
        )
    if config.seq_len > model.context_length:
        raise UsageError(
            f"{model.name} is made for {model.context_length:,} tokens, and a sample has {config.seq_len:,}.",
            f"--seq-len {model.context_length}",
        )


def _as_configured(made: Plan, config: TuneConfig) -> Plan:
    """The plan with what this trainer's own settings change: float32 compute, moments, what is kept, offload."""
    assert isinstance(made.task, Finetune)
    task, memory = largest_pass(made.model, made.task, made.hardware.device), made.memory
    stack = get_stack(made.stack)
    if config.precision == "fp32":
        wide = {part: 2 * getattr(memory, part) for part in ("weights", "activations")}
        if task.method == "full":  # the weights are their own master
            wide = {"weights": 0, "activations": 2 * memory.activations}
        memory = replace(memory, **wide)
        stage = zero_stage(made.task, stack, made.hardware.world_size)
        speed = finetune_speed(made.model, made.hardware, made.task, "fp32", stack, stage)
        made = replace(made, precision="fp32", speed=speed)
    if (config.moments == "fp32" or config.deepspeed) and config.optimizer == "fp32":
        memory = replace(memory, optimizer=memory.optimizer + 4 * trainable(made.model, task).total)
    if config.keep == "attention":
        attention = task.tokens * 2 * made.model.q_size * made.model.num_layers
        memory = replace(memory, activations=memory.activations + attention)
    if config.offload:
        memory = replace(memory, activations=memory.activations - checkpoint_bytes(made.model, task))
    return replace(
        made, memory=memory, memory_per_device=(memory,), verdict=verdict(memory, made.capacity, stack), advice=()
    )


def _does_not_fit(made: Plan) -> str:
    device = made.hardware.device
    parts = ", ".join(
        f"{part} {getattr(made.memory, part) / 1e9:.1f}" for part in Memory.PARTS if getattr(made.memory, part) > 5e7
    )
    return (
        f"{made.task.name} of {made.model.name} in {made.precision} needs {size(made.memory.process)} and "
        f"{device.name} has {size(made.capacity)} free ({parts} GB)."
    )


def _what_would(made: Plan) -> str:
    ways = [f"{a.what} ({a.process_bytes / 1e9:.1f} GB)" for a in advice_for(made) if a.process_bytes is not None]
    return "; ".join(ways) if ways else "a smaller model: qwenfit plan --task lora shows what fits here"


def is_out_of_memory(error: BaseException) -> bool:
    """torch's error for a GPU, its RuntimeError for the CPU's allocator, or Python's own."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


def out_of_memory(error: BaseException, made: Plan, config: TuneConfig, step: int) -> QwenfitError:
    """The error to show: which term of the plan was being allocated, and the next smaller setting."""
    term = exceeded_term(error.__traceback__)
    planned = made.memory
    return DoesNotFit(
        f"Memory ran out in step {step} at the plan's {term}: it has {getattr(planned, term) / 1e9:.2f} GB "
        f"for them, {size(planned.process)} in all, of {size(made.capacity)} that were free at the start.",
        _next_smaller(made, config) or "a smaller model: qwenfit plan --task lora shows what fits here",
    )


def exceeded_term(traceback: TracebackType | None) -> str:
    """The field of Memory that the failing allocation belongs to; the backward pass recomputes activations."""
    files = set()
    while traceback is not None:
        files.add(traceback.tb_frame.f_code.co_filename.rpartition("/")[2])
        traceback = traceback.tb_next
    return next((term for file, term in _TERMS if file in files), "activations")


def _next_smaller(made: Plan, config: TuneConfig) -> str:
    """The first setting that makes the plan smaller, in the order of what it costs."""
    for flag, changed in _smaller(config, made.hardware.device.kind):
        smaller = plan_tune(replace(changed, force=True))
        if smaller.memory.process < made.memory.process:
            return f"{flag} (planned: {size(smaller.memory.process)})"
    return ""


def _smaller(config: TuneConfig, device: str) -> Iterator[tuple[str, TuneConfig]]:
    if config.micro_batch > 1:
        half, more = config.micro_batch // 2, config.grad_accum * 2
        yield f"--micro-batch {half} --grad-accum {more}", replace(config, micro_batch=half, grad_accum=more)
    if config.keep != "inputs":
        yield "--keep inputs", replace(config, keep="inputs")
    if config.moments == "fp32":
        yield "--moments bf16", replace(config, moments="bf16")
    if not config.offload and device == "gpu":
        yield "--offload", replace(config, offload=True)
    if config.method in ("full", "lora-emb"):
        yield "--method lora", replace(config, method="lora")
    if config.seq_len > 256:
        yield f"--seq-len {config.seq_len // 2}", replace(config, seq_len=config.seq_len // 2)
    if config.method in (None, "lora") and config.precision != "fp32":
        yield "--method qlora", replace(config, method="qlora", precision=None)
    if config.optimizer == "fp32":
        yield "--optimizer 8bit", replace(config, optimizer="8bit")
