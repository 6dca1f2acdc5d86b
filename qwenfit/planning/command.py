"""The command that does what a plan says."""

from __future__ import annotations

from qwenfit.planning.task import Finetune, Inference
from qwenfit.planning.types import Plan


def command_for(plan: Plan) -> str:
    """What to type: qwenfit's own verbs, or the other stack's command with the same sizes."""
    if isinstance(plan.task, Finetune):
        return _tune(plan, plan.task)
    if plan.stack == "vllm":
        return _vllm(plan, plan.task)
    return _chat(plan, plan.task)


def _model(plan: Plan) -> str:
    return plan.spec or plan.model.name


def _chat(plan: Plan, task: Inference) -> str:
    parts = ["qwenfit", "chat" if task.batch == 1 else "generate", _model(plan), "--precision", plan.precision]
    if task.kv_cache == "int8":
        parts += ["--kv-cache", "int8"]
    parts += ["--context", str(task.context)]
    if task.batch > 1:
        parts += ["--batch", str(task.batch)]
    if plan.hardware.world_size > 1:
        parts += ["--gpus", str(plan.hardware.gpus)]
    return " ".join(parts)


def _vllm(plan: Plan, task: Inference) -> str:
    repo = f"./{plan.model.name.split('/')[-1]}-qwen2" if plan.model.architecture == "qwen1" else _model(plan)
    parts = ["vllm serve", repo, "--max-model-len", str(task.context), "--max-num-seqs", str(task.batch)]
    if plan.parallel == "tensor":
        parts += ["--tensor-parallel-size", str(plan.hardware.world_size)]
    elif plan.parallel == "layers":
        parts += ["--pipeline-parallel-size", str(plan.hardware.world_size)]
    if task.kv_cache == "int8":
        parts += ["--kv-cache-dtype", "fp8"]
    command = " ".join(parts)
    if plan.model.architecture == "qwen1":  # vLLM has no Qwen-1 model any more
        command = f"qwenfit convert {_model(plan)} {repo} && {command}"
    return command


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
    if plan.parallel in ("zero2", "zero3"):
        parts += ["--zero", plan.parallel[-1]]
    return " ".join(parts)
