"""Seconds per optimizer step: products, element-wise traffic, dequantization, host and links."""

from __future__ import annotations

from qwenfit.config import ModelConfig
from qwenfit.hardware import Hardware
from qwenfit.planning.constants import fitted, read
from qwenfit.planning.device_speed import MEASURED_READ_SHARE, READ_SHARE, link_bandwidth, matmul_flops
from qwenfit.planning.finetune_cpu import cpu_seconds, update_seconds
from qwenfit.planning.finetune_memory import trainable
from qwenfit.planning.finetune_qwenfit import LONG_ATTENTION, as_run, share, traffic_bytes
from qwenfit.planning.stack import Stack
from qwenfit.planning.task import Finetune
from qwenfit.planning.types import BANDWIDTH, COMPUTE, HOST, LINK, Interval, Speed
from qwenfit.planning.weights import quantized_parameters, weight_bytes


def training_flops(config: ModelConfig, task: Finetune) -> float:
    """Floating-point operations per micro-batch.

    Per token and weight: forward 2, recomputation 2 (with checkpointing), input gradient 2, weight gradient 2 where
    trained; the head is not recomputed. Causal attention is 2 s d L forward, once more for the recomputation, and
    2.5 times that backward (flash-attention's own count).
    """
    tokens, recompute = task.tokens, 2 if task.checkpointing else 0
    parts = trainable(config, task)
    linear = quantized_parameters(config) * (4 + recompute + (2 if parts.whole else 0))
    head = config.embedding_parameters * (4 + (2 if parts.whole or parts.tables else 0))
    adapters = parts.adapters * (6 + recompute)
    return float(tokens * (linear + head + adapters)) + attention_flops(config, task)


def attention_flops(config: ModelConfig, task: Finetune) -> float:
    """Attention's part of `training_flops`."""
    passes = 1 + (1 if task.checkpointing else 0) + 2.5
    return float(task.tokens * 2 * task.seq_len * config.q_size * config.num_layers * passes)


def _own_compute(config: ModelConfig, task: Finetune, flops: float) -> float:
    """Seconds of one pass's products and attention, `flops` being what a large product reaches."""
    attention = attention_flops(config, task)
    products = training_flops(config, task) - attention
    kind = "train_attention_share" if task.seq_len >= LONG_ATTENTION else "train_short_attention_share"
    return (products / share("train_product_share") + attention / share(kind)) / flops


def _own_host(config: ModelConfig, task: Finetune) -> float:
    """Seconds in which the host launches one pass."""
    adapters = 0.0 if task.method == "full" else share("train_host_adapters")
    packed = share("train_host_packed") if task.method == "qlora" else 0.0
    return config.num_layers * (share("train_host") + adapters + packed)


def finetune_speed(
    config: ModelConfig,
    hardware: Hardware,
    task: Finetune,
    precision: str,
    stack: Stack,
    stage: int,
    host_factor: float = 1.0,
) -> Speed:
    """One optimizer step of `grad_accum` micro-batches on every device; tokens/s counts all devices."""
    device = hardware.device
    own = stack.name == "qwenfit" and device.kind != "cpu"
    if own:
        task = as_run(config, task, device)
    steps = task.grad_accum
    if own:
        compute = _own_compute(config, task, matmul_flops(device, precision))
        traffic = traffic_bytes(config, task) / (device.bandwidth * share("train_traffic_share"))
        host = _own_host(config, task) * host_factor
    elif stack.name == "qwenfit":
        compute, traffic, host = cpu_seconds(config, task, device, precision, training_flops(config, task))
    else:
        compute = training_flops(config, task) / matmul_flops(device, precision)
        traffic = _elementwise_bytes(config, task, stack) / device.bandwidth
        host = config.num_layers * stack.train_host * host_factor
    if stage == 3 and stack.name == "transformers-4.3x":
        host += config.num_layers * fitted("host_zero3_2023") * host_factor
    unpack = _dequantization_seconds(config, hardware, precision, stack)
    link = _link_seconds(config, hardware, task, precision, stack, stage)
    if own:
        micro = max(compute + traffic + unpack, host) + link
    elif stack.name == "qwenfit":  # nothing overlaps: the CPU is its own host
        micro = compute + traffic + host + unpack + link
    else:
        micro = max(compute + traffic, host) + unpack + link
    own_cpu = stack.name == "qwenfit" and not own
    update = _update_seconds(config, hardware, task, stage, own_cpu) * (share("train_update_passes") if own else 1)
    seconds = steps * micro + update
    tokens = steps * task.tokens * hardware.world_size / seconds
    error = stack.speed_error
    terms = {"compute": compute, "memory": traffic + unpack, "host": host, "link": link}
    return Speed(
        bound=_bound(compute, traffic, unpack, host, link, own),
        tokens_per_s=tokens,
        interval=Interval(tokens / (1 + error), tokens / (1 - error)),
        seconds_per_iter=seconds,
        seconds_per_iter_interval=Interval(seconds * (1 - error), seconds * (1 + error)),
        terms={name: steps * value for name, value in terms.items()},
    )


def _bound(compute: float, traffic: float, unpack: float, host: float, link: float, own: bool) -> str:
    shares = {COMPUTE: compute, BANDWIDTH: traffic + unpack, LINK: link}
    if host > compute + traffic + (unpack if own else 0):
        shares = {HOST: host, BANDWIDTH: 0.0 if own else unpack, LINK: link}
    return max(shares, key=lambda name: shares[name])


def _elementwise_bytes(config: ModelConfig, task: Finetune, stack: Stack) -> float:
    """Traffic of norms, rotation, activation, dropout and casts in a micro-batch; this project fuses it away."""
    if stack.name == "qwenfit":
        return 0.0
    per_unit = fitted("activation_traffic") * (1 if task.method == "full" else 2)
    return per_unit * task.tokens * config.num_layers * config.hidden_size


def _dequantization_seconds(config: ModelConfig, hardware: Hardware, precision: str, stack: Stack) -> float:
    """Int8/Int4 weights are dequantized in the forward pass and again in the recomputation."""
    if precision not in ("int8", "int4"):
        return 0.0
    bandwidth = hardware.device.bandwidth * MEASURED_READ_SHARE.get(hardware.device.name, READ_SHARE)
    per_weight = read("gptq_dequantize_traffic") if stack.name.startswith("transformers") else 5.0
    passes = 2 if stack.name.startswith("transformers") else 3
    return passes * per_weight * quantized_parameters(config) / bandwidth


def _link_seconds(
    config: ModelConfig, hardware: Hardware, task: Finetune, precision: str, stack: Stack, stage: int
) -> float:
    """Per micro-batch: gradients of what is trained, and under ZeRO-3 the weights, gathered twice."""
    devices = hardware.world_size
    if devices == 1:
        return 0.0
    share = (devices - 1) / devices
    gradients = 2 * trainable(config, task).total * share * (1 if stage >= 2 else 2)
    gathered = 2 * weight_bytes(config, precision, stack.name).total * share if stage == 3 else 0
    return (gradients + gathered) / link_bandwidth(hardware)


def _update_seconds(
    config: ModelConfig, hardware: Hardware, task: Finetune, stage: int, own_cpu: bool = False
) -> float:
    """AdamW reads and writes weights, gradient and both moments: about 40 bytes per float32-mastered parameter."""
    share = hardware.world_size if stage >= 2 else 1
    if own_cpu:
        return update_seconds(task, hardware.device, trainable(config, task).total)
    per_parameter = {"fp32": 40, "bf16": 14, "8bit": 20}[task.optimizer]
    return per_parameter * trainable(config, task).total / share / hardware.device.bandwidth
