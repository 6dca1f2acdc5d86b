"""Speed of inference: time to first token and decode tokens/s, as the slowest of host, memory, compute and link."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from qwenfit.config import ModelConfig
from qwenfit.hardware import Device, Hardware
from qwenfit.planning.constants import measured, read
from qwenfit.planning.device_speed import cpu_read_share, link_bandwidth, matmul_flops, read_bandwidth, unpack_time
from qwenfit.planning.inference_memory import kv_bytes_per_token
from qwenfit.planning.stack import CODES_REQUESTS, MANY_REQUESTS, READ_KINDS, Stack
from qwenfit.planning.task import Inference
from qwenfit.planning.types import BANDWIDTH, COMPUTE, HOST, LINK, Interval, Speed
from qwenfit.planning.weights import quantized_parameters, weight_bytes, with_head

FEW_ROWS = 4  # up to here the matrix-vector kernels multiply (kernels/native.py)
ONEDNN_ROWS = 24  # from here on int8 and int4 weights are unpacked for bf16 instructions (kernels/choice.py)
HOPPER_UNITS = 132  # multiprocessors of the cards that rows_limits were measured on
ROWS_AT_ONCE = 512  # of a prompt for which weights become tiles once (kernels/tiles.c)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one decode step by cause; `memory` includes unpacking and the gaps between kernels.

    `further`: on a CPU, the products of all requests but the first, which hide behind nothing.
    """

    memory: float
    compute: float
    host: float
    link: float
    further: float = 0.0

    @property
    def total(self) -> float:
        return max(self.memory, self.compute, self.host) + self.link + self.further

    @property
    def bound(self) -> str:
        slowest = max(self.memory, self.compute, self.host)
        if self.link > slowest:
            return LINK
        if self.further > slowest:
            return COMPUTE
        return BANDWIDTH if slowest == self.memory else COMPUTE if slowest == self.compute else HOST


def decode_flops(config: ModelConfig) -> int:
    """Floating-point operations per generated token in linear layers and head (two per weight)."""
    return 2 * (quantized_parameters(config) + config.embedding_parameters)


def step_reads(
    config: ModelConfig, hardware: Hardware, task: Inference, precision: str, stack: Stack
) -> dict[str, float]:
    """Bytes that one decode step of all requests reads at their mean context (prompt + half the answer), by kind."""
    on_cpu = hardware.device.kind == "cpu"
    weights = with_head(config, weight_bytes(config, precision, stack.name, on_cpu), task.head_precision, on_cpu)
    layers = weights.layer * weights.num_layers
    kv = task.batch * (task.prompt + task.generate / 2) * kv_bytes_per_token(config, task.kv_cache, stack)
    reads = dict.fromkeys(READ_KINDS, 0.0)
    plain = "plain" if task.batch == 1 else "plain_rows"
    reads[precision if precision in reads else plain] += layers
    reads[task.head_precision or plain] += weights.read_per_token - layers
    cache = "cache_int8" if task.kv_cache == "int8" else "cache"
    reads[f"{cache}_rows" if task.batch > MANY_REQUESTS[cache] else cache] += kv
    return reads


def decode_step(
    config: ModelConfig,
    hardware: Hardware,
    task: Inference,
    precision: str,
    stack: Stack,
    parallel: str,
    host_factor: float = 1.0,
) -> StepTime:
    """One decode step of all requests at their mean context (prompt + half the answer).

    Layers placed one after the other take turns, so several devices are no faster than one; tensor parallel divides
    the bytes and adds two all-reduces per layer.
    """
    device = hardware.device
    shards = hardware.world_size if parallel == "tensor" else 1
    reads = step_reads(config, hardware, task, precision, stack)
    quantized = quantized_parameters(config) if precision in ("int8", "int4") else 0
    bandwidth = read_bandwidth(device, stack)
    on_cpu = device.kind == "cpu"
    shares = dict.fromkeys(READ_KINDS, cpu_read_share(device, stack)) if on_cpu else stack.read_shares
    limits = {} if on_cpu else dict(stack.read_limits)
    several = takes_rows(device, task.batch, stack)
    if several:
        limits |= {kind: rows_limit(stack, kind, task.batch, device) for kind in ("int4", "int8")}
    rates = {kind: min(bandwidth * shares.get(kind, 1.0), limits.get(kind, math.inf)) for kind in reads}
    if several:
        rates["plain_rows"] = plain_rows_rate(stack, task.batch, device)
    memory = sum(nbytes / rates[kind] for kind, nbytes in reads.items()) / shards
    memory += quantized * unpack_time(device, stack) / shards
    if on_cpu:
        memory += config.num_layers * measured("qwenfit_cpu_layer_gap")
    else:
        rows_gap = stack.rows_gap if precision in stack.rows_limits else stack.plain_rows_gap
        gap = stack.layer_overhead + rows_gap * (several and task.batch > 2)
        shared = config.num_kv_heads < config.num_heads
        gap += stack.codes_gap * (task.kv_cache == "int8" and (shared or task.batch > CODES_REQUESTS))
        gap += stack.shared_gap * (shared and task.batch <= 2)
        memory += config.num_layers * gap + stack.step_host * host_factor
    rows = 1 if on_cpu else task.batch
    compute = decode_flops(config) * rows / matmul_flops(device, precision) / shards
    per_layer = stack.decode_host_int4 if precision == "int4" else stack.decode_host
    host = config.num_layers * per_layer * host_factor
    link = 0.0
    if parallel == "tensor":
        message = task.batch * 2 * config.hidden_size
        link = 2 * config.num_layers * (read("nccl_latency") + 2 * message / link_bandwidth(hardware))
    further = further_seconds(config, device, task.batch, precision) / shards if on_cpu else 0.0
    return StepTime(memory, compute, host, link, further)


def takes_rows(device: Device, rows: int, stack: Stack) -> bool:
    """Whether several requests meet products that are planned by their number."""
    return device.kind != "cpu" and rows > 1 and bool(stack.rows_limits)


def rows_limit(stack: Stack, kind: str, rows: int, device: Device) -> float:
    """Bytes/s at which a card multiplies int4 or int8 weights at most with so many rows: by its share of a Hopper."""
    limits = stack.rows_limits[kind]
    limit = next((limits[count] for count in sorted(limits) if rows <= count), limits[max(limits)])
    return limit * (device.units or HOPPER_UNITS) / HOPPER_UNITS


def plain_rows_rate(stack: Stack, rows: int, device: Device) -> float:
    """Bytes/s at which 16-bit weights are multiplied with so many rows; seconds are linear between what was measured.

    Up to 64 rows a share of the memory's speed; from then on no faster than a card's cores, by its share of a Hopper.
    """
    bandwidth, scale = read_bandwidth(device, stack), (device.units or HOPPER_UNITS) / HOPPER_UNITS
    few, some = bandwidth * stack.read_shares["plain_rows"], bandwidth * stack.share_of_64
    many = [(count, min(some, limit * scale)) for count, limit in stack.rows_limits["plain_rows"].items()]
    rates = [(1, few), (16, few), (64, some), *many]
    for (count, rate), (next_count, next_rate) in itertools.pairwise(rates):
        if rows <= next_count:
            part = (rows - count) / (next_count - count)
            return 1 / ((1 - part) / rate + part / next_rate)
    return rates[-1][1]


def further_seconds(config: ModelConfig, device: Device, batch: int, precision: str) -> float:
    """What the products of all requests but the first add to a decode step on a CPU.

    Few rows are multiplied while weights are read; more by tiles, by bf16 instructions, or in float32 panels.
    """
    flops = decode_flops(config)
    if batch <= FEW_ROWS:
        return flops * (batch - 1) / (matmul_flops(device, "fp32") * measured("qwenfit_cpu_few_rows_share"))
    if by_tiles(device, precision):
        seconds = flops * batch / (matmul_flops(device, precision) * measured("qwenfit_cpu_prefill_tiles"))
        return seconds + math.ceil(batch / ROWS_AT_ONCE) * unpack_seconds(config, device, precision)
    if device.bf16 and (precision == "bf16" or (precision in ("int8", "int4") and batch >= ONEDNN_ROWS)):
        return flops * batch / (matmul_flops(device, precision) * measured("qwenfit_cpu_prefill_share"))
    return flops * (batch - 1) / (matmul_flops(device, "fp32") * measured("qwenfit_cpu_rows_share"))


def prefill_flops(config: ModelConfig, prompt: int) -> int:
    """Floating-point operations of one prompt: linear layers, causal attention, the head for its last token."""
    linear = 2 * quantized_parameters(config) * prompt + 2 * config.embedding_parameters
    return linear + 2 * config.num_layers * config.q_size * prompt * prompt


def prefill_seconds(
    config: ModelConfig,
    hardware: Hardware,
    prompt: int,
    precision: str,
    stack: Stack,
    parallel: str,
    host_factor: float = 1.0,
) -> tuple[float, str]:
    """Seconds until the first token of one prompt alone, and what binds them.

    The products and causal attention with what the host adds, or one decode-like pass: the slower. Where a CPU's tiles
    multiply, which takes so little time that it hides nothing: both, and unpacking the weights.
    """
    shards = hardware.world_size if parallel == "tensor" else 1
    device = hardware.device
    on_cpu, tiles = device.kind == "cpu", by_tiles(device, precision) and prompt > FEW_ROWS
    share = measured("qwenfit_cpu_prefill_share") if on_cpu else stack.prefill_share
    share = measured("qwenfit_cpu_prefill_tiles") if tiles else share
    compute = prefill_flops(config, prompt) / (matmul_flops(device, precision) * share) / shards
    alone = Inference(prompt=1, generate=1, batch=1)
    least = decode_step(config, hardware, alone, precision, stack, parallel, host_factor)
    if tiles:
        weights = least.total + config.num_layers * measured("qwenfit_cpu_prompt_gap")
        weights += unpack_seconds(config, device, precision)
        passes = math.ceil(prompt / ROWS_AT_ONCE)
        return passes * weights + compute, COMPUTE if compute >= passes * weights else least.bound
    host = 0.0 if on_cpu or prompt == 1 else stack.prompt_host * host_factor
    return max((least.total, least.bound), (compute + host, COMPUTE if compute >= host else HOST))


def by_tiles(device: Device, precision: str) -> bool:
    """Whether the engine multiplies prompts by the tile instructions of a CPU: bf16, and int8 and int4 made bf16."""
    return device.kind == "cpu" and device.tensor_cores and device.bf16 and precision in ("bf16", "int8", "int4")


def unpack_seconds(config: ModelConfig, device: Device, precision: str) -> float:
    """Seconds to make bf16 tiles of all int8 or int4 layers once, on all cores; bf16 ones are turned while read."""
    if precision == "bf16":
        return 0.0
    return quantized_parameters(config) * measured("qwenfit_cpu_tile_unpack") / (device.units or 1)


def inference_speed(
    config: ModelConfig,
    hardware: Hardware,
    task: Inference,
    precision: str,
    stack: Stack,
    parallel: str,
    host_factor: float = 1.0,
) -> Speed:
    """Decode speed of all requests together and of one, and the time to first token of one prompt."""
    step = decode_step(config, hardware, task, precision, stack, parallel, host_factor)
    first, first_bound = prefill_seconds(config, hardware, task.prompt, precision, stack, parallel, host_factor)
    error = stack.speed_error
    if hardware.device.kind == "cpu":
        error = max(error, measured("qwenfit_cpu_speed_error"))
    first_interval = _around(first, error)
    if stack.name == "qwenfit" and by_tiles(hardware.device, precision) and task.prompt > FEW_ROWS:
        quiet, busy = measured("qwenfit_cpu_tiles_quiet"), measured("qwenfit_cpu_tiles_busy")
        first_interval = Interval(first * quiet, first * busy)
    unlike = task.batch > 256 or precision in stack.rows_limits  # what was measured
    if unlike and takes_rows(hardware.device, task.batch, stack):
        error = max(error, measured("qwenfit_rows_speed_error"))
    per_request = 1 / step.total
    total = per_request * task.batch
    return Speed(
        bound=step.bound,
        tokens_per_s=total,
        interval=_around(total, error),
        tokens_per_s_per_request=per_request,
        tokens_per_s_per_request_interval=_around(per_request, error),
        time_to_first_token=first,
        time_to_first_token_interval=first_interval,
        time_to_first_token_bound=first_bound,
        prompt_tokens_per_s=task.prompt / first,
        terms={"memory": step.memory, "compute": step.compute + step.further, "host": step.host, "link": step.link},
    )


def _around(value: float, error: float) -> Interval:
    return Interval(value * (1 - error), value * (1 + error))
