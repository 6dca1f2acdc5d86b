"""The command that does what a plan says."""

from __future__ import annotations

import shlex

from qwenfit.planning.task import Finetune, Inference
from qwenfit.planning.types import Plan

STAGES = {"data": "0", "zero2": "2", "zero3": "3"}  # Plan.parallel of a finetuning on several GPUs -> --zero


def command_for(plan: Plan) -> str:
    """What to type: qwenfit's own verbs, or the other stack's command with the same sizes."""
    if plan.stack != "qwenfit" or runs_elsewhere(plan):
        from qwenfit.planning.peer_command import peer_command

        return peer_command(plan)
    return _tune(plan, plan.task) if isinstance(plan.task, Finetune) else _chat(plan, plan.task)


def runs_elsewhere(plan: Plan) -> bool:
    """qwenfit's own engine works on one device: over several an inference is vLLM's to run."""
    return plan.stack == "qwenfit" and isinstance(plan.task, Inference) and plan.hardware.world_size > 1


def _model(plan: Plan) -> str:
    return shlex.quote(plan.spec or plan.model.name)


def _chat(plan: Plan, task: Inference) -> str:
    parts = ["qwenfit", "chat" if task.batch == 1 else "generate", _model(plan), "--precision", plan.precision]
    if task.kv_cache not in ("bf16", "fp16") or plan.precision == "fp32":  # else what the verbs choose by themselves
        parts += ["--kv-cache", task.kv_cache]
    if task.head_precision is not None:
        parts += ["--head-precision", task.head_precision]
    parts += ["--context", str(task.context)]
    if task.batch > 1:
        parts += ["--batch", str(task.batch), "--input", "PROMPTS.jsonl", "--output", "ANSWERS.jsonl"]
    return " ".join(parts + _on_cpu(plan))


def _on_cpu(plan: Plan) -> list[str]:
    """The verbs take a GPU where there is one, so that the CPU has to be named."""
    return ["--device", "cpu"] if plan.hardware.device.kind == "cpu" else []


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
    return " ".join(parts + _on_cpu(plan))
