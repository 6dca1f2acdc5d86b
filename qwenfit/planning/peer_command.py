"""The command of other software that does what a plan says: vLLM, today's transformers, and the guide's of 2023."""

from __future__ import annotations

import os
import shlex

from qwenfit.catalog import canonical_name, hub_name
from qwenfit.planning.stack import STACKS
from qwenfit.planning.task import Finetune, Inference
from qwenfit.planning.types import Plan

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
# The only Qwen3 of which Qwen itself publishes integer weights: Int4 by AWQ, Int8 by GPTQ.
QWEN3_INT4, QWEN3_INT8 = ("Qwen3-4B", "Qwen3-8B", "Qwen3-14B", "Qwen3-32B"), ("Qwen3-0.6B", "Qwen3-1.7B")


def peer_command(plan: Plan) -> str:
    """What to type, by the plan's stack; vLLM's where qwenfit's own engine has no way to do it."""
    task, old = plan.task, plan.stack == "transformers-4.3x"
    if isinstance(task, Finetune):
        return _finetune_py(plan, task) if old else _trl(plan, task)
    return _cli_demo(plan, task) if old else _converted_first(plan, task)


def _converted_first(plan: Plan, task: Inference) -> str:
    """vLLM and transformers 5 have no Qwen-1 any more: its checkpoint is converted to the layout of Qwen2."""
    serve = _transformers_serve if plan.stack == "transformers-5" else _vllm
    if plan.model.architecture != "qwen1":
        return serve(plan, task, hub_id(plan))
    converted = shlex.quote(f"./{plan.model.name.split('/')[-1]}-{plan.precision}-qwen2")
    return f"qwenfit convert {hub_id(plan)} {converted} && {serve(plan, task, converted)}"


def _vllm(plan: Plan, task: Inference, model: str) -> str:
    parts = ["vllm serve", model, "--max-model-len", str(task.context), "--max-num-seqs", str(task.batch)]
    parts += ["--gpu-memory-utilization", f"{_utilization(plan):.2f}"]
    if plan.parallel in ("tensor", "layers"):
        kind = "tensor" if plan.parallel == "tensor" else "pipeline"
        parts += [f"--{kind}-parallel-size", str(plan.hardware.world_size)]
    if plan.precision in ("fp16", "fp32"):
        parts += ["--dtype", DTYPES[plan.precision]]
    elif _rounds_itself(plan):
        parts += ["--quantization", "bitsandbytes" if plan.precision == "int4" else "fp8"]
    if task.kv_cache == "int8":
        parts += ["--kv-cache-dtype", "fp8"]
    return " ".join(parts)


def _utilization(plan: Plan) -> float:
    """vLLM's share of the whole card: of a detected one it gets its share of what is free."""
    device = plan.hardware.device
    total = device.memory_bytes if device.visible_bytes is None or device.detected else device.visible_bytes
    return (STACKS["vllm"].utilization or 1.0) * plan.capacity / total


def _transformers_serve(plan: Plan, task: Inference, model: str) -> str:
    parts = ["transformers serve", model]
    if plan.precision in DTYPES:
        parts += ["--dtype", DTYPES[plan.precision]]
    elif _rounds_itself(plan):
        parts += ["--quantization", "bnb-4bit" if plan.precision == "int4" else "bnb-8bit"]
    if plan.hardware.device.kind == "cpu":
        parts += ["--device", "cpu"]
    return " ".join(parts)


def _cli_demo(plan: Plan, task: Inference) -> str:
    """The official repository's demo; its int8 cache is an argument of from_pretrained, not of the script."""
    command = f"python cli_demo.py -c {hub_id(plan)}"
    if plan.hardware.device.kind == "cpu":
        command += " --cpu-only"
    if task.kv_cache == "int8":
        command += (
            "  # its from_pretrained with use_cache_quantization=True, use_cache_kernel=True, use_flash_attn=False"
        )
    return command


def _finetune_py(plan: Plan, task: Finetune) -> str:
    """finetune.py of QwenLM/Qwen@2df8e8a; it adds embedding and head to LoRA where the path does not say "chat"."""
    hardware = plan.hardware
    parts = ["torchrun", "--nproc_per_node", str(hardware.gpus)]
    if hardware.nodes > 1:
        parts += ["--nnodes", str(hardware.nodes), "--node_rank", "$NODE_RANK", "--master_addr", "$MASTER_ADDR"]
    model = _chat_id(plan) if task.method == "lora" else hub_id(plan)
    half = "--fp16" if task.method == "qlora" or plan.precision == "fp16" else "--bf16"
    parts += ["finetune.py", "--model_name_or_path", model, "--data_path", "DATA.json", "--output_dir", "tuned"]
    parts += [half, "True", "--lazy_preprocess", "True"]
    if task.method != "full":
        parts += ["--use_lora", "--lora_r", str(task.lora_rank)]
    if task.method == "qlora":
        parts += ["--q_lora"]
    parts += _sizes(task, "--model_max_length")
    stage = {"zero2": 2, "zero3": 3}.get(plan.parallel, 0)
    if plan.parallel == "single" and task.zero is None:  # what the scripts for one GPU do
        stage = {"full": 3, "qlora": 2}.get(task.method, 0)
    if stage:
        parts += ["--deepspeed", f"finetune/ds_config_zero{stage}.json"]
    return " ".join(parts)


def _trl(plan: Plan, task: Finetune) -> str:
    """TRL's trainer, which is transformers' own with PEFT. Its Q-LoRA rounds the 16-bit model by bitsandbytes."""
    hardware = plan.hardware
    parts = ["trl sft"]
    if hardware.world_size > 1:
        kind = {"zero2": "zero2", "zero3": "zero3"}.get(plan.parallel, "multi_gpu")
        parts += ["--accelerate_config", kind, "--num_processes", str(hardware.world_size)]
    if hardware.nodes > 1:
        parts += ["--num_machines", str(hardware.nodes), "--machine_rank", "$NODE_RANK"]
        parts += ["--main_process_ip", "$MASTER_ADDR", "--main_process_port", "29500"]
    model = f"./{plan.model.name.split('/')[-1]}-qwen2" if plan.model.architecture == "qwen1" else hub_id(plan, "bf16")
    dtype = "float32" if task.method == "full" and task.optimizer == "fp32" else DTYPES.get(plan.precision, "bfloat16")
    parts += ["--model_name_or_path", shlex.quote(model), "--dataset_name", "DATA", "--dtype", dtype]
    if task.method != "full":
        parts += ["--use_peft", "--lora_r", str(task.lora_rank), "--lora_target_modules", "all-linear"]
    if task.method == "lora-emb":
        parts += ["--lora_modules_to_save", "embed_tokens", "lm_head"]
    if task.method == "qlora":
        parts += ["--load_in_4bit" if plan.precision == "int4" else "--load_in_8bit"]
    parts += _sizes(task, "--max_length")
    if task.optimizer == "8bit":
        parts += ["--optim", "adamw_8bit"]
    if task.fused_loss:
        parts += ["--use_liger_kernel"]
    command = " ".join(parts)
    if plan.model.architecture == "qwen1":
        command = f"qwenfit convert {hub_id(plan, 'bf16')} {shlex.quote(model)} && {command}"
    return command


def _sizes(task: Finetune, length: str) -> list[str]:
    parts = [length, str(task.seq_len), "--per_device_train_batch_size", str(task.micro_batch)]
    parts += ["--gradient_accumulation_steps", str(task.grad_accum)]
    return [*parts, "--gradient_checkpointing", str(task.checkpointing)]


def _chat_id(plan: Plan) -> str:
    """The chat model of a Qwen-1 or 1.5, which the script trains without embedding and head."""
    chats = _named(plan) and plan.model.name.startswith(("Qwen-", "Qwen1.5-"))
    return hub_name(f"{plan.model.name}-Chat") if chats else hub_id(plan)


def _named(plan: Plan) -> bool:
    """Whether the model is one of the catalog's, named as such, and not a folder, a file or another's repository."""
    return not os.path.exists(plan.spec) and canonical_name(plan.spec).lower() == plan.model.name.lower()


def _rounds_itself(plan: Plan) -> bool:
    """Qwen publishes no such integer weights: the software rounds those of 16 bits as it loads them."""
    if not _named(plan) or plan.precision not in ("int8", "int4"):
        return False
    published = QWEN3_INT4 if plan.precision == "int4" else QWEN3_INT8
    return plan.model.architecture == "qwen3" and plan.model.name not in published


def hub_id(plan: Plan, precision: str | None = None) -> str:
    """The Hub repository of a catalog model in the plan's precision; a path or another repository as it was named."""
    precision, name, spec = precision or plan.precision, plan.model.name, plan.spec
    if not _named(plan):
        sibling = "/" not in spec and not os.path.exists(spec)  # Qwen2.5-7B-Instruct-AWQ
        return shlex.quote(hub_name(spec) if sibling else spec)
    if precision not in ("int8", "int4") or _rounds_itself(plan):
        return hub_name(name + spec.strip().split("/")[-1][len(name) :])
    bits = precision.capitalize()
    if plan.model.architecture == "qwen3":
        return f"Qwen/{name}-AWQ" if precision == "int4" else f"Qwen/{name}-GPTQ-Int8"
    suffix = {"Qwen": f"-Chat-{bits}", "Qwen1.5": f"-Chat-GPTQ-{bits}"}
    return hub_name(name + suffix.get(name.split("-")[0], f"-Instruct-GPTQ-{bits}"))
