"""Memory of inference, part by part, for each stack and each way to use several devices. Bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from qwenfit.config import ModelConfig
from qwenfit.hardware import Device, Hardware
from qwenfit.planning.constants import fitted, read
from qwenfit.planning.stack import Stack
from qwenfit.planning.task import Inference
from qwenfit.planning.types import Memory
from qwenfit.planning.weights import WeightBytes, split_layers, tensor_parallel_bytes, weight_bytes, with_head

CHUNK = 2048  # tokens of prompts that a paged engine works on at once
BLOCK = 16  # tokens per block of a paged cache


def kv_bytes_per_token(config: ModelConfig, kv_cache: str, stack: Stack) -> int:
    """Bytes one token leaves in the cache over all layers.

    int8: Qwen-1's code keeps a 16-bit scale and zero per token and head; qwenfit a float32 scale and zero; vLLM's
    8-bit cache is fp8 and keeps none.
    """
    if kv_cache == "int8":
        per_head = {"qwenfit": 8, "vllm": 0}.get(stack.name, 4)
        return config.kv_elements_per_token + 2 * config.num_layers * config.num_kv_heads * per_head
    return config.kv_elements_per_token * (4 if kv_cache == "fp32" else 2)


def cached_tokens(task: Inference, stack: Stack) -> int:
    """Tokens in the cache when all requests are at their end; a paged cache keeps a shared prefix once."""
    if not stack.paged:
        return task.batch * task.context
    shared = task.shared_prefix // BLOCK * BLOCK
    own = math.ceil((task.context - shared) / BLOCK) * BLOCK
    return task.batch * own + shared


def prompt_activations(config: ModelConfig, tokens: int) -> int:
    """Peak of one layer while `tokens` prompt tokens pass: residual, normed input and the MLP's three inner tensors."""
    attention = 2 * config.hidden_size + 2 * config.q_size + 2 * config.kv_size
    mlp = 2 * config.hidden_size + 3 * config.intermediate_size
    return tokens * 2 * max(attention, mlp)


def context_bytes(device: Device) -> int:
    """Driver context and libraries that no allocator counts: a CPU process's interpreter and torch itself."""
    if device.kind == "cpu":
        return int(read("cpu_process"))
    newer = device.compute_capability is not None and device.compute_capability >= (9, 0)
    return int(read("cuda_context_hopper" if newer else "cuda_context"))


def workspace_bytes(device: Device) -> int:
    """cuBLAS's workspace; nothing on other devices."""
    if device.compute_capability is None:
        return 0
    return int(read("cublas_workspace_hopper" if device.compute_capability >= (9, 0) else "cublas_workspace"))


def uses_flash_attention(task: Inference, stack: Stack, device: Device) -> bool:
    """FlashAttention runs where asked for or by default where the card has it; not beside the old int8 cache."""
    if task.kv_cache == "int8" and not stack.kv_int8_with_flash:
        return False
    if task.flash_attention is not None:
        return task.flash_attention
    return device.flash_attention > 0


@dataclass(frozen=True)
class _Moment:
    """A candidate for the peak: tokens in the cache, tokens passing through a layer, rows of logits."""

    cached: int
    active: int
    logits_rows: int


def _moments(task: Inference, stack: Stack) -> list[_Moment]:
    """The end of the prompt and the end of the answer; a paged engine has all its cache from the start."""
    prompt = task.batch * task.prompt
    if stack.paged:
        return [_Moment(cached_tokens(task, stack), max(min(prompt, CHUNK), task.batch), task.batch)]
    rows = task.batch if stack.last_token_logits else prompt
    return [_Moment(prompt, prompt, rows), _Moment(cached_tokens(task, stack), task.batch, task.batch)]


def inference_memory(
    config: ModelConfig, hardware: Hardware, task: Inference, precision: str, stack: Stack, parallel: str
) -> tuple[Memory, ...]:
    """Memory of every device, in order, at the peak. `parallel`: "single", "layers" (one after the other), "tensor"."""
    candidates = [
        tuple(
            _device_memory(config, hardware, task, precision, stack, parallel, moment, place)
            for place in range(hardware.world_size)
        )
        for moment in _moments(task, stack)
    ]
    return max(candidates, key=lambda devices: max(m.allocated for m in devices))


def _device_memory(
    config: ModelConfig,
    hardware: Hardware,
    task: Inference,
    precision: str,
    stack: Stack,
    parallel: str,
    moment: _Moment,
    place: int,
) -> Memory:
    devices = hardware.world_size
    on_cpu = hardware.device.kind == "cpu"
    weights = with_head(config, weight_bytes(config, precision, stack.name, on_cpu), task.head_precision, on_cpu)
    layers = split_layers(weights.num_layers, devices)[place]
    last = place == devices - 1
    cache = moment.cached * kv_bytes_per_token(config, task.kv_cache, stack) * stack.cache_copies
    if parallel == "tensor":
        own_weights, share, last = (
            tensor_parallel_bytes(config, weights, devices),
            1 / min(devices, config.num_kv_heads),
            True,
        )
    else:
        own_weights, share = _placed_weights(weights, layers, first=place == 0, last=last), layers / weights.num_layers
    activations = prompt_activations(config, moment.active)
    logits = moment.logits_rows * config.vocab_size * (4 if stack.last_token_logits else 2) if last else 0
    if logits >= activations:  # either a layer's activations live, or the logits do
        activations = 0
    else:
        logits = 0
    memory = Memory(
        weights=own_weights,
        kv_cache=int(cache * share),
        logits=logits,
        activations=activations,
        workspace=_workspace(config, hardware.device, task, precision, stack, moment),
    )
    return _with_reserve(memory, hardware.device, stack)


def _placed_weights(weights: WeightBytes, layers: int, first: bool, last: bool) -> int:
    """Weights of one device when layers are placed in order: the embedding on the first, norm and head on the last."""
    total = layers * weights.layer
    if first:
        total += weights.embedding
    if last:
        total += weights.final_norm + (weights.head or (0 if first else weights.embedding))
    return total


def _workspace(
    config: ModelConfig, device: Device, task: Inference, precision: str, stack: Stack, moment: _Moment
) -> int:
    total = workspace_bytes(device)
    one_layer = moment.cached * 4 * config.kv_size  # 16-bit keys and values of one layer
    if stack.name == "transformers-4.3x":
        flash = uses_flash_attention(task, stack, device)
        if precision in ("int8", "int4") or not flash:
            total += int(fitted("scratch_2023"))
        if not flash:  # one layer's keys and values once more: made contiguous, or dequantized
            total += one_layer
    if stack.name == "transformers-5":  # the layer whose cache is growing exists twice
        total += one_layer
    return total


def _with_reserve(memory: Memory, device: Device, stack: Stack) -> Memory:
    """Adds what the allocator and the driver hold; vLLM fills its share of the card with cache."""
    on_gpu = device.kind != "cpu"
    reserve = int(memory.allocated * read("growing_cache_reserve")) if on_gpu and not stack.paged else 0
    pool = 0
    if stack.utilization is not None and on_gpu:
        pool = max(0, int(stack.utilization * device.usable_bytes) - memory.allocated - context_bytes(device))
    return replace(memory, kv_cache=memory.kv_cache + pool, reserve=reserve, context=context_bytes(device))
