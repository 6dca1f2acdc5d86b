"""Memory of finetuning, part by part: states, checkpoints, the live layer, the logits, and the optimizer's step.

The peak is one of three moments of a step: the loss (logits and their gradient live), the backward pass of one
layer (its recomputed activations live; with GPTQ weights their dequantized copies too), or the optimizer's update
(its temporaries live). Bytes on one device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from qwenfit.config import ModelConfig, published_linears
from qwenfit.hardware import Hardware
from qwenfit.planning.constants import fitted, measured, read
from qwenfit.planning.finetune_qwenfit import (
    all_layers_bytes,
    growing_gradients,
    largest_pass,
    layer_bytes,
    loss_bytes,
    parked_bytes,
    share,
    update_bytes,
)
from qwenfit.planning.inference_memory import context_bytes, workspace_bytes
from qwenfit.planning.stack import Stack
from qwenfit.planning.task import Finetune
from qwenfit.planning.types import Memory
from qwenfit.planning.weights import largest_linear, weight_bytes

LOSS_CHUNK_BYTES = 128 * 2**20  # logits a fused loss holds at once, turned into their gradient in place


@dataclass(frozen=True)
class Trainable:
    """Trained parameters by kind: adapters, copies of embedding and head, or the whole model."""

    adapters: int
    tables: int
    whole: int

    @property
    def total(self) -> int:
        return self.adapters + self.tables + self.whole


def lora_parameters(config: ModelConfig, rank: int) -> int:
    """A [rank, in] and a [out, rank] matrix for every published linear layer, as the official script places them.

    53.7 M, 143.1 M, 223.2 M and 755 M for Qwen-1.8B, 7B, 14B and 72B at rank 64.
    """
    return config.num_layers * rank * sum(s.in_features + s.out_features for s in published_linears(config))


def trainable(config: ModelConfig, task: Finetune) -> Trainable:
    if task.method == "full":
        return Trainable(0, 0, config.parameters)
    tables = config.embedding_parameters * (1 if config.tie_word_embeddings else 2)
    return Trainable(lora_parameters(config, task.lora_rank), tables if task.method == "lora-emb" else 0, 0)


@dataclass(frozen=True)
class _StateBytes:
    """Bytes per trained parameter."""

    weight: float  # the trained copy
    gradient: float
    optimizer: float  # moments, and master weights where they are apart
    step: float  # temporaries of the update

    @property
    def kept(self) -> float:
        return self.weight + self.gradient + self.optimizer


def state_bytes(regime: str, stack: Stack) -> _StateBytes:
    """By optimizer regime. AdamW in its foreach form makes two temporaries of the moments' type while it updates.

    qwenfit keeps the moments in bf16 beside float32 weights and gradients (DeepSeek-V3, arXiv 2412.19437, sec. 3.3.3:
    no observable degradation).
    """
    return {
        "fp32": _StateBytes(4, 4, 4 if stack.name == "qwenfit" else 8, 8),
        "bf16": _StateBytes(2, 2, 4, 4),
        "8bit": _StateBytes(4, 4, 2, 2),
    }[regime]


def zero_stage(task: Finetune, stack: Stack, devices: int) -> int:
    """The ZeRO stage: as asked, else what the official scripts use (full: 3, Q-LoRA: 2, LoRA on several GPUs: 2)."""
    if task.zero is not None:
        return task.zero
    if stack.name == "transformers-4.3x":
        if task.method == "full":
            return 3
        if task.method == "qlora":
            return 2
    if devices == 1:
        return 0
    return 3 if task.method == "full" else 2 if task.method != "qlora" else 0


def finetune_memory(
    config: ModelConfig, hardware: Hardware, task: Finetune, precision: str, stack: Stack, stage: int
) -> tuple[Memory, ...]:
    """Memory of every device at its peak (they are equal)."""
    devices = hardware.world_size
    base = _states(config, task, precision, stack, stage, devices)
    own = stack.name == "qwenfit" and hardware.device.kind != "cpu"
    if own:
        parts = trainable(config, task)
        growing = growing_gradients(config, task, hardware.device, parts.adapters, parts.whole)
        growing = min(growing, base.gradients)  # a process's part
        moments = _own_moments(
            base, config, largest_pass(config, task, hardware.device), precision, stack, devices, growing
        )
    else:
        moments = (
            _at_loss(base, config, task, stack),
            _at_layer(base, config, task, precision, stack),
            _at_step(base, config, task, stack, stage, devices),
        )
    peak = max(moments, key=lambda m: m.allocated)
    overhead = int(fitted("train_overhead_2023")) if stack.name == "transformers-4.3x" else 0
    cpu = hardware.device.kind == "cpu"
    context = int(measured("qwenfit_cpu_train_process")) if cpu else context_bytes(hardware.device)
    reserve = (
        max(0, overhead - context) if overhead else int((share("train_reserve") if own else 0.02) * peak.allocated)
    )
    peak = replace(peak, workspace=peak.workspace + workspace_bytes(hardware.device), reserve=reserve, context=context)
    return (peak,) * devices


def _states(config: ModelConfig, task: Finetune, precision: str, stack: Stack, stage: int, devices: int) -> Memory:
    """Weights, gradients, optimizer and adapters between micro-batches, and DeepSpeed's buffers."""
    weights = weight_bytes(config, precision, stack.name).total
    parts = trainable(config, task)
    split = devices if stage >= 2 else 1
    if task.method == "full":
        return _full_states(config, task, stack, stage, split)
    state = state_bytes(task.optimizer, stack)
    tables = state_bytes("bf16", stack) if stack.name.startswith("transformers") else state
    if stage == 3:
        # Whole for a while: DeepSpeed as many parameters as it is allowed, fully_shard a layer and the next one.
        live = 2 * config.linear_parameters_per_layer
        if stack.name == "transformers-4.3x":
            live = min(int(read("zero3_live_parameters")), config.num_layers * config.linear_parameters_per_layer)
        gathered = 2 * live + 2 * config.embedding_parameters
        weights = weights // devices
    else:
        gathered = 0
    buckets = int(read("zero2_buckets")) if stack.name == "transformers-4.3x" and stage >= 2 else 0
    return Memory(
        weights=weights,
        adapters=int(parts.adapters * state.weight + parts.tables * tables.weight) // (split if stage == 3 else 1),
        gradients=int(parts.adapters * state.gradient + parts.tables * tables.gradient) // split,
        optimizer=int(parts.adapters * state.optimizer + parts.tables * tables.optimizer) // split,
        workspace=gathered + buckets,
    )


def _full_states(config: ModelConfig, task: Finetune, stack: Stack, stage: int, split: int) -> Memory:
    """Full-parameter states. DeepSpeed keeps 2 + 4 + 8 bytes and a float32 gradient: 18 per parameter over the GPUs."""
    p = config.parameters
    if stack.name == "transformers-4.3x":
        weights = 2 * p // (split if stage == 3 else 1)
        return Memory(
            weights=weights,
            gradients=4 * p // split,
            optimizer=12 * p // split,
            workspace=int(read("zero2_buckets")) + (2 * config.embedding_parameters if split > 1 else 0),
        )
    if task.optimizer == "bf16":
        weight, gradient, optimizer = 2.0, 2.0, 4.0
    elif task.optimizer == "8bit":
        weight, gradient, optimizer = 2, 2, 2 + 4
    else:  # a 16-bit copy to compute with, and the float32 weights beside the moments
        state = state_bytes("fp32", stack)
        weight, gradient, optimizer = 2, state.gradient, state.weight + state.optimizer
    gathered = 2 * 2 * config.linear_parameters_per_layer if stage == 3 else 0
    return Memory(
        weights=int(weight * p) // (split if stage == 3 else 1) + gathered,
        gradients=int(gradient * p) // split,
        optimizer=int(optimizer * p) // split,
    )


def _own_moments(
    base: Memory,
    config: ModelConfig,
    task: Finetune,
    precision: str,
    stack: Stack,
    devices: int,
    growing: int,
) -> tuple[Memory, ...]:
    """This project's trainer on a GPU: the loss, a layer's backward pass, the embedding's gradient, the update.

    growing: bytes of gradients that are not there before the backward pass.
    """
    base = replace(base, weights=base.weights - parked_bytes(config, task, devices))
    parts = trainable(config, task)
    kept = checkpoint_bytes(config, task) if task.checkpointing else all_layers_bytes(config, task)
    live = layer_bytes(config, task, precision in ("int8", "int4"), parts.adapters) if task.checkpointing else 0
    tables = 2 * config.embedding_parameters if parts.tables or parts.whole else 0
    head = 0 if task.optimizer == "fp32" else tables  # in float32 the head's gradient is added where it belongs
    loss = loss_bytes(config, task, LOSS_CHUNK_BYTES)
    if task.fused_loss is False:  # as if the logits were whole: in float32, with their copies
        loss = 12 * task.tokens * config.vocab_size
    return (
        replace(base, logits=loss, activations=kept, gradients=base.gradients + head - growing),
        replace(base, activations=max(0, kept - growing) + live),
        replace(base, gradients=base.gradients + tables),
        replace(base, workspace=base.workspace + update_bytes(parts.total, task.optimizer)),
    )


def checkpoint_bytes(config: ModelConfig, task: Finetune) -> int:
    """With checkpointing each layer keeps its 16-bit input; without, every layer keeps what a live one holds."""
    if task.checkpointing:
        return task.tokens * 2 * config.num_layers * config.hidden_size
    return config.num_layers * layer_activations(config, task)


def layer_activations(config: ModelConfig, task: Finetune) -> int:
    """What one layer's backward pass needs: inputs of norms and linears, q k v, attention output, inner tensors.

    16-bit, no attention matrix (FlashAttention); the norms and the rotation keep float32 copies. Adapters with
    dropout keep the dropped input of every linear layer and their [tokens, rank] products.
    """
    h, m, qkv = config.hidden_size, config.intermediate_size, config.q_size + 2 * config.kv_size
    elements = 6 * h + 2 * qkv + 5 * m
    if task.method != "full":
        elements += 3 * h + m + 7 * task.lora_rank
    return task.tokens * 2 * elements


def _at_loss(base: Memory, config: ModelConfig, task: Finetune, stack: Stack) -> Memory:
    """Logits, their float32 copy, the shifted copy and the gradient; under DeepSpeed's fp16/bf16 all in 16 bits.

    A fused loss works through the tokens in chunks. A trained head's weight gradient is made here.
    """
    full = task.tokens * config.vocab_size
    if task.fused_loss if task.fused_loss is not None else stack.fused_loss:
        logits = min(4 * full, LOSS_CHUNK_BYTES) + 2 * task.tokens * config.hidden_size
    else:
        autocast = stack.name != "transformers-4.3x" or task.method in ("lora", "lora-emb")
        logits = (12 if autocast else 8) * full
    tables = trainable(config, task)
    head_gradient = 2 * config.embedding_parameters if tables.tables or (tables.whole and not stack.fused_loss) else 0
    return replace(
        base,
        logits=logits,
        activations=checkpoint_bytes(config, task),
        gradients=base.gradients + head_gradient,
    )


def _at_layer(base: Memory, config: ModelConfig, task: Finetune, precision: str, stack: Stack) -> Memory:
    """One layer recomputed and differentiated; AutoGPTQ's layers keep dequantized copies and make temporaries."""
    live = layer_activations(config, task) if task.checkpointing else 0
    workspace = base.workspace
    if precision in ("int8", "int4"):
        if stack.name.startswith("transformers"):
            workspace += 2 * config.linear_parameters_per_layer
            workspace += int(read("gptq_dequantize_bytes") * largest_linear(config))
        else:
            workspace += 2 * largest_linear(config)
    return replace(base, activations=checkpoint_bytes(config, task) + live, workspace=workspace)


def _at_step(base: Memory, config: ModelConfig, task: Finetune, stack: Stack, stage: int, devices: int) -> Memory:
    """The update's temporaries; ZeRO-3 updates a sub-group of parameters at a time, torch all at once."""
    parts = trainable(config, task)
    if stack.name == "qwenfit":  # on a CPU, a group of parameters at a time
        return replace(base, workspace=base.workspace + update_bytes(parts.total, "fp32"))
    if task.method == "full":
        own = parts.whole / (devices if stage >= 2 else 1)
        temporaries = 8 * min(own, read("zero3_sub_group")) if stack.name == "transformers-4.3x" else 8 * own
    else:
        tables = state_bytes("bf16", stack)
        temporaries = parts.adapters * state_bytes(task.optimizer, stack).step + parts.tables * tables.step
        temporaries /= devices if stage >= 2 else 1
    return replace(base, workspace=base.workspace + int(temporaries))


def states_lower_bound(config: ModelConfig, task: Finetune, gpus: int) -> float:
    """Bytes per GPU below which no run of the guide's software can go, however it shards: the states alone.

    Full-parameter ZeRO keeps at least 16 bytes per parameter (DeepSpeed, memory requirements: 2 + 2 + 12). Adapters
    need the base weights in their precision and 16 bytes per adapter parameter.
    """
    if task.method == "full":
        return 16 * config.parameters / gpus
    precision = "int4" if task.method == "qlora" else "bf16"
    weights = weight_bytes(config, precision, "transformers-4.3x").total
    return (weights + 16 * lora_parameters(config, task.lora_rank)) / gpus
