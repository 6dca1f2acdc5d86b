"""What this project's trainer takes on one GPU: memory and seconds, from what its code does, and the constants.

FITTED below are the numbers to fit again from records of `qwenfit bench tune --table`: `python -m
qwenfit.bench.refit_tune measurements/tune-*.json`. All else is counted from tune/fused.py: tensors alive at the peak,
elements read and written, products.
"""

from __future__ import annotations

import math
from dataclasses import replace

from qwenfit.config import ModelConfig
from qwenfit.hardware import Device
from qwenfit.planning.constants import Constant
from qwenfit.planning.task import Finetune

PASS_ELEMENTS = 1 << 24  # micro-batches run together on a GPU up to so many tokens x hidden size: 4,096 tokens of 7B
SMALL_GPU = 16e9  # bytes: below, half of it; such GPUs are slow enough for their host with less
GROUP_ELEMENTS = 1 << 24  # parameters that the optimizer updates at once

LONG_ATTENTION = 2048  # tokens of a sample from which Hopper takes cuDNN's attention
_FIRST_RUN = "one H200, 2026-11-24, torch 2.11"

FITTED: dict[str, Constant] = {
    c.name: c
    for c in (
        Constant(
            "train_product_share",
            0.765,
            "of a large product's speed",
            "the products of a training pass, adapters' narrow ones and the head's included",
            f"8 x 4096 in 3.12 s and 8 x 8192 in 6.63 s, LoRA on Qwen-7B: {_FIRST_RUN}",
        ),
        Constant(
            "train_attention_share",
            0.65,
            "of a large product's speed",
            "attention forward and backward of long samples, cuDNN's on Hopper",
            f"3.50 ms for one layer of Qwen-7B at 8192 tokens, 1.14 ms at 4096: {_FIRST_RUN}",
        ),
        Constant(
            "train_short_attention_share",
            0.32,
            "of a large product's speed",
            "attention forward and backward of short samples, FlashAttention 2",
            f"1.93 ms for one layer of Qwen-7B at 4096 tokens: {_FIRST_RUN}",
        ),
        Constant(
            "train_traffic_share",
            0.85,
            "of peak bandwidth",
            "what kernels that only read and write reach",
            "copies on an H100 reach 3.03 of 3.35 TB/s; gaps between kernels take the rest",
        ),
        Constant(
            "train_host",
            4.6e-3,
            "s per layer and pass",
            "the host's time to launch one layer's forward, recomputation and backward from Python",
            f"full, Qwen-1.8B: 5.7 ms, {_FIRST_RUN}; less what one node for a block saves of it on a CPU, a fifth",
        ),
        Constant(
            "train_host_adapters",
            2.1e-3,
            "s per layer and pass",
            "what seven adapters add to it",
            "8 x 256 tokens, LoRA on Qwen-7B: 0.206 and 0.220 s in measurements/tune-h100-*.json and tune-h200-*.json",
        ),
        Constant(
            "train_host_packed",
            1.4e-3,
            "s per layer and pass",
            "what unpacking four weights three times adds to it",
            "8 x 256 tokens, Q-LoRA on Qwen-7B: 0.255 and 0.266 s in the same",
        ),
        Constant(
            "train_update_passes",
            2.0,
            "times the bytes of one update",
            "gradients' norm, gathering into groups, and the update itself",
            "counted from tune/optimizer.py",
        ),
        Constant(
            "train_reserve",
            0.02,
            "of allocated",
            "blocks that torch's allocator holds beyond the peak",
            f"0.2 to 4.7 %, 1.1 % and more with LoRA: {_FIRST_RUN}",
        ),
    )
}


def share(name: str) -> float:
    return FITTED[name].value


def pass_elements(gpu_bytes: float) -> int:
    """Tokens x hidden size of a pass on a GPU of so much memory."""
    return PASS_ELEMENTS if gpu_bytes >= SMALL_GPU else PASS_ELEMENTS // 2


def gpu_bytes(device: Device) -> float:
    """Memory of a GPU; 0 for a CPU."""
    return 0 if device.kind == "cpu" else device.memory_bytes


def micro_batches_per_pass(tokens: int, hidden_size: int, grad_accum: int, gpu_bytes: float) -> int:
    """Micro-batches of `tokens` tokens that run as one on a GPU of `gpu_bytes`, of equal numbers where that goes.

    Gradients are the same, divided by the step's trained tokens; small products become large, and the host launches
    fewer. A CPU (0) gains nothing.
    """
    if not gpu_bytes:
        return 1
    most = min(grad_accum, max(1, pass_elements(gpu_bytes) // (tokens * hidden_size)))
    return math.ceil(grad_accum / math.ceil(grad_accum / most))


def as_run(config: ModelConfig, task: Finetune, device: Device) -> Finetune:
    """The task with the micro-batches of a pass as one."""
    together = micro_batches_per_pass(task.tokens, config.hidden_size, task.grad_accum, gpu_bytes(device))
    passes = math.ceil(task.grad_accum / together)
    return replace(task, micro_batch=together * task.micro_batch, grad_accum=passes)


def largest_pass(config: ModelConfig, task: Finetune, device: Device) -> Finetune:
    """The task with one sample as long as all that a pass may hold: what memory is planned for.

    Lengths that do not divide a pass take less; so a longer sample is never planned smaller than a shorter one.
    """
    most = task.tokens
    if device.kind != "cpu":
        most = min(task.tokens * task.grad_accum, pass_elements(gpu_bytes(device)) // config.hidden_size)
    return replace(task, micro_batch=1, seq_len=max(task.tokens, most))


def parked_bytes(config: ModelConfig, task: Finetune, devices: int) -> int:
    """The embedding that waits in host memory: frozen, no head too, of one process."""
    frozen = task.method in ("lora", "qlora") and not config.tie_word_embeddings
    return 2 * config.embedding_parameters if frozen and devices == 1 else 0


def layer_bytes(config: ModelConfig, task: Finetune, packed: bool, adapters: int) -> int:
    """The live layer at its peak: the down projection's gradient, or the gate's while its weight is dense again.

    Alive then are the inputs of the norms and products, q k v, the gate's input (whose gradient takes its place); of
    gradients, the layer's output's, and that of the product's input, twice with adapters (it goes through dropout).
    adapters: trained parameters of all layers' adapters.
    """
    h, m = config.hidden_size, config.intermediate_size
    kept = 3 * h + 2 * config.q_size + 2 * config.kv_size + 2 * m
    adapter = task.method != "full"
    down = kept + h + (3 if adapter else 2) * m
    gate = kept + (3 if adapter else 2) * h
    dense = 2 if packed or not adapter else 0  # bytes: a copy of the packed weight, or the weight's gradient
    narrow = 2 * adapters // config.num_layers if task.optimizer != "bf16" else 0  # the layer's adapters in 16 bits
    return narrow + max(2 * task.tokens * down + dense * h * m, 2 * task.tokens * gate + dense * 2 * h * m)


def growing_gradients(config: ModelConfig, task: Finetune, device: Device, adapters: int, whole: int) -> int:
    """Bytes of gradients that come into being layer by layer in a step of one pass; 0 where they are there before it.

    They take the place of the layers' inputs, which go meanwhile. Float32 gradients of 16-bit weights have buffers.
    """
    if as_run(config, task, device).grad_accum > 1:
        return 0
    return (2 if task.optimizer == "bf16" else 4) * adapters + (0 if task.optimizer == "fp32" else 2 * whole)


def all_layers_bytes(config: ModelConfig, task: Finetune) -> int:
    """What every layer keeps when nothing is computed again."""
    h, m = config.hidden_size, config.intermediate_size
    kept = 3 * h + 2 * config.q_size + 2 * config.kv_size + 3 * m
    return 2 * task.tokens * config.num_layers * kept


def loss_bytes(config: ModelConfig, task: Finetune, chunk: int) -> int:
    """The last norm's input and results, the trained rows and their gradient; the logits of one chunk of `chunk`."""
    rows = max(128, chunk // (2 * config.vocab_size) // 128 * 128)
    return 2 * (6 * task.tokens * config.hidden_size + min(task.tokens, rows) * config.vocab_size)


def update_bytes(parameters: int, optimizer: str) -> int:
    """A group's gradients and weights end to end; the 8-bit states are updated by torch, in float32 temporaries."""
    each = {"fp32": 8, "bf16": 4, "8bit": 32}[optimizer]
    return each * min(parameters, GROUP_ELEMENTS)


def traffic_bytes(config: ModelConfig, task: Finetune) -> float:
    """Read and written by one pass besides the operands of large products.

    Forward: norms, rotation, gate and sums; with adapters each layer's dropped input and the result that their
    product is added to. Backward: the same kernels' gradients. The forward part counts twice under checkpointing.
    """
    h, m, q, qkv = (
        config.hidden_size,
        config.intermediate_size,
        config.q_size,
        config.q_size + 2 * config.kv_size,
    )
    if task.method == "full":
        forward, backward = 9 * h + 2 * qkv + 3 * m, 8 * h + 2 * qkv + 5 * m
    else:
        forward, backward = 17 * h + 4 * qkv + 2 * q + 9 * m, 26 * h + 4 * qkv + 7 * q + 16 * m
    elements = forward * (2 if task.checkpointing else 1) + backward
    return 2.0 * task.tokens * config.num_layers * elements
