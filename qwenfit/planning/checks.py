"""What cannot be planned at all: a context beyond the model, a task that a stack or a card does not have."""

from __future__ import annotations

from qwenfit.config import ModelConfig
from qwenfit.errors import UsageError
from qwenfit.hardware import Device
from qwenfit.planning.stack import Stack
from qwenfit.planning.task import Inference, Task


def check_context(config: ModelConfig, task: Task) -> None:
    """UsageError when the task needs more tokens of context than the model is made for."""
    tokens = task.context if isinstance(task, Inference) else task.seq_len
    # The guide's own runs put one token of context before the answer: its 8,192 tokens are 8,193 positions.
    if tokens > config.context_length + 1:
        more = (
            "" if config.yarn or config.architecture == "qwen1" else " (a YaRN rope_scaling in config.json extends it)"
        )
        raise UsageError(
            f"{config.name} is made for {config.context_length} tokens of context, not {tokens}{more}.",
            f"Ask for --context {config.context_length} or less.",
        )


def check_precision(config: ModelConfig, precision: str) -> None:
    """UsageError where integers of a checkpoint would be rounded a second time, to other integers."""
    stored = config.quantization
    if stored is not None and precision in ("int8", "int4") and precision != f"int{stored.bits}":
        raise UsageError(
            f"{config.name} holds int{stored.bits} weights, which {precision} would round a second time.",
            f"Use --precision int{stored.bits}, or the 16-bit model.",
        )


def check_task(device: Device, task: Task, stack: Stack) -> None:
    """UsageError where the stack's software or the card cannot do the task at all."""
    if isinstance(task, Inference):
        if task.head_precision is not None and stack.name != "qwenfit":
            raise UsageError(f"{stack.name} keeps the head in 16 bits.", "Leave --head-precision out.")
        if task.flash_attention and not device.flash_attention:
            raise UsageError(f"FlashAttention does not run on {device.name}.", "Leave --flash-attention out.")
        return
    if stack.utilization is not None:
        raise UsageError(f"{stack.name} does not finetune.", "Use --stack qwenfit or --stack transformers-5.")
    own = stack.name == "qwenfit"  # copies on each GPU; the official script goes through DeepSpeed's ZeRO-2
    if task.method == "qlora" and (task.zero == 3 or (task.zero and own)):
        raise UsageError(
            f"ZeRO-{task.zero} cannot shard the quantized weights of Q-LoRA.", "--zero 0" if own else "Use --zero 2."
        )
    if stack.name != "transformers-4.3x":
        return
    if task.method == "lora-emb" and task.zero == 3:
        raise UsageError("The official script refuses ZeRO-3 when LoRA trains the embedding too.", "Use --zero 2.")
    if task.method == "full" and task.optimizer != "fp32":
        raise UsageError(
            f"DeepSpeed keeps float32 master weights and moments, so {stack.name} has no {task.optimizer} optimizer.",
            "Use --stack qwenfit or --stack transformers-5.",
        )
