"""The command that does what a plan says."""

from __future__ import annotations

import os
import shlex

from qwenfit.catalog import canonical_name
from qwenfit.planning.stack import get_stack
from qwenfit.planning.task import Finetune, Inference
from qwenfit.planning.types import Plan

STAGES = {"data": "0", "zero2": "2", "zero3": "3"}  # Plan.parallel of a finetuning on several GPUs -> --zero


def command_for(plan: Plan) -> str:
    """What to type: qwenfit's own verbs, or the other stack's command with the same sizes."""
    if isinstance(plan.task, Finetune):
        return _tune(plan, plan.task)
    if plan.stack == "vllm":
        return _vllm(plan, plan.task)
    return _chat(plan, plan.task)


def _model(plan: Plan) -> str:
    return shlex.quote(plan.spec or plan.model.name)


def _chat(plan: Plan, task: Inference) -> str:
    parts = ["qwenfit", "chat" if task.batch == 1 else "generate", _model(plan), "--precision", plan.precision]
    if task.kv_cache == "int8":
        parts += ["--kv-cache", "int8"]
    if task.head_precision is not None:
        parts += ["--head-precision", task.head_precision]
    parts += ["--context", str(task.context)]
    if task.batch > 1:
        parts += ["--batch", str(task.batch)]
    if plan.hardware.world_size > 1:
        parts += ["--gpus", str(plan.hardware.gpus)]
    return " ".join(parts)


def _vllm(plan: Plan, task: Inference) -> str:
    qwen1 = plan.model.architecture == "qwen1"
    converted = shlex.quote(f"./{plan.model.name.split('/')[-1]}-{plan.precision}-qwen2")
    parts = ["vllm serve", converted if qwen1 else hub_id(plan)]
    parts += ["--max-model-len", str(task.context), "--max-num-seqs", str(task.batch)]
    parts += ["--gpu-memory-utilization", f"{_utilization(plan):.2f}"]
    if plan.parallel == "tensor":
        parts += ["--tensor-parallel-size", str(plan.hardware.world_size)]
    elif plan.parallel == "layers":
        parts += ["--pipeline-parallel-size", str(plan.hardware.world_size)]
    if task.kv_cache == "int8":
        parts += ["--kv-cache-dtype", "fp8"]
    command = " ".join(parts)
    if qwen1:  # vLLM has no Qwen-1 model any more
        command = f"qwenfit convert {hub_id(plan)} {converted} && {command}"
    return command


def _utilization(plan: Plan) -> float:
    """vLLM's share of the whole card: of a detected one it gets its share of what is free."""
    device = plan.hardware.device
    total = device.memory_bytes if device.visible_bytes is None or device.detected else device.visible_bytes
    return (get_stack(plan.stack).utilization or 1.0) * plan.capacity / total


def hub_id(plan: Plan) -> str:
    """The Hub repository of a catalog model in the plan's precision; a path or another repository as it was named."""
    name = plan.model.name
    if canonical_name(plan.spec) != name or os.path.exists(plan.spec):
        return _model(plan)
    if plan.precision not in ("int8", "int4"):
        return f"Qwen/{name}"
    bits = plan.precision.capitalize()
    generation = name.split("-")[0]
    suffix = {"Qwen": f"-Chat-{bits}", "Qwen1.5": f"-Chat-GPTQ-{bits}", "Qwen3": f"-GPTQ-{bits}"}
    return f"Qwen/{name}{suffix.get(generation, f'-Instruct-GPTQ-{bits}')}"


def _tune(plan: Plan, task: Finetune) -> str:
    launch = "qwenfit tune"
    hardware = plan.hardware
    if hardware.world_size > 1:
        nodes = (
            f" --nnodes {hardware.nodes} --node-rank $NODE_RANK --master-addr $MASTER_ADDR"
            if hardware.nodes > 1
            else ""
        )
        launch = f"torchrun --nproc-per-node {hardware.gpus}{nodes} -m qwenfit tune"
    parts = [launch, _model(plan), "--data DATA.jsonl", "--method", task.method, "--seq-len", str(task.seq_len)]
    parts += ["--micro-batch", str(task.micro_batch), "--grad-accum", str(task.grad_accum)]
    if task.method != "full":
        parts += ["--lora-rank", str(task.lora_rank)]
    if task.optimizer != "fp32":
        parts += ["--optimizer", task.optimizer]
    if not task.checkpointing:
        parts += ["--keep", "all"]
    if task.method == "qlora" and plan.model.quantization is None and plan.precision != "int4":
        parts += ["--precision", plan.precision]
    if plan.parallel in STAGES:
        parts += ["--zero", STAGES[plan.parallel]]
    return " ".join(parts)
