"""What this project's trainer takes on one GPU: memory and seconds, from what its code does, and the constants.

FITTED below are the numbers to fit again from a record of `qwenfit bench tune --table`; all else is counted from
tune/fused.py: tensors alive at the peak, elements read and written, products. Goals until such a record exists.
"""

from __future__ import annotations

import math
from dataclasses import replace

from qwenfit.config import ModelConfig
from qwenfit.planning.constants import Constant
from qwenfit.planning.task import Finetune

PASS_ELEMENTS = 1 << 23  # micro-batches run together on a GPU up to so many tokens x hidden size: 2,048 tokens of 7B
GROUP_ELEMENTS = 1 << 24  # parameters that the optimizer updates at once

FITTED: dict[str, Constant] = {
    c.name: c
    for c in (
        Constant(
            "train_product_share",
            0.85,
            "of a large product's speed",
            "the products of a training pass, adapters' narrow ones and the head's included",
            "goal: 0.80 s for 8 x 1024 tokens, LoRA on Qwen-7B, on an H100",
        ),
        Constant(
            "train_attention_share",
            0.56,
            "of a large product's speed",
            "attention forward and backward",
            "goal: 6.9 s for 8 x 8192 tokens, LoRA on Qwen-7B, on an H100",
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
            2.0e-3,
            "s per layer and pass",
            "the host's time to launch one layer's forward, recomputation and backward from Python",
            "about 160 launches of 10 us, and autograd",
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
            0.015,
            "of allocated",
            "blocks that torch's allocator holds beyond the peak",
            "goal; transformers 5.17 on an H100 holds 0.066",
        ),
    )
}


def share(name: str) -> float:
    return FITTED[name].value


def micro_batches_per_pass(tokens: int, hidden_size: int, grad_accum: int, kind: str) -> int:
    """Micro-batches of `tokens` tokens that run as one on a device of `kind`, of equal numbers where that goes.

    Gradients are the same, divided by the step's trained tokens; small products become large. A CPU gains nothing.
    """
    if kind == "cpu":
        return 1
    most = min(grad_accum, max(1, PASS_ELEMENTS // (tokens * hidden_size)))
    return math.ceil(grad_accum / math.ceil(grad_accum / most))


def as_run(config: ModelConfig, task: Finetune, kind: str) -> Finetune:
    """The task with the micro-batches of a pass as one."""
    together = micro_batches_per_pass(task.tokens, config.hidden_size, task.grad_accum, kind)
    passes = math.ceil(task.grad_accum / together)
    return replace(task, micro_batch=together * task.micro_batch, grad_accum=passes)


def largest_pass(config: ModelConfig, task: Finetune, kind: str) -> Finetune:
    """The task with one sample as long as all that a pass may hold: what memory is planned for.

    Lengths that do not divide a pass take less; so a longer sample is never planned smaller than a shorter one.
    """
    most = task.tokens if kind == "cpu" else min(task.tokens * task.grad_accum, PASS_ELEMENTS // config.hidden_size)
    return replace(task, micro_batch=1, seq_len=max(task.tokens, most))


def parked_bytes(config: ModelConfig, task: Finetune, devices: int) -> int:
    """The embedding that waits in host memory: frozen, no head too, of one process."""
    frozen = task.method in ("lora", "qlora") and not config.tie_word_embeddings
    return 2 * config.embedding_parameters if frozen and devices == 1 else 0


def layer_bytes(config: ModelConfig, task: Finetune, packed: bool) -> int:
    """The live layer at its peak: the down projection's gradient, or the gate's while its weight is dense again.

    Alive then are the inputs of the norms and products, q k v, the gate's input (whose gradient takes its place); of
    gradients, the layer's output's, and that of the product's input, twice with adapters (it goes through dropout).
    """
    h, m = config.hidden_size, config.intermediate_size
    kept = 3 * h + 2 * config.q_size + 2 * config.kv_size + 2 * m
    adapter = task.method != "full"
    down = kept + h + (3 if adapter else 2) * m
    gate = kept + (3 if adapter else 2) * h
    dense = 2 if packed or not adapter else 0  # bytes: a copy of the packed weight, or the weight's gradient
    return max(2 * task.tokens * down + dense * h * m, 2 * task.tokens * gate + dense * 2 * h * m)


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
