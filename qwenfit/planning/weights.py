"""Bytes of weights: whole, per layer, and as several devices share them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from qwenfit.config import (
    DTYPE_BYTES,
    LinearShape,
    ModelConfig,
    Quantization,
    TensorInfo,
    checkpoint_tensors,
    published_linears,
)
from qwenfit.errors import UsageError

DTYPE_OF = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "int8": "float16", "int4": "float16"}
BITS = {"bf16": 16, "fp16": 16, "fp32": 32, "int8": 8, "int4": 4}
GROUP_SIZE = 128
IN_ORDER = "Place the layers one after the other (--parallel layers), or use fewer GPUs."  # where tensors do not divide


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of a model's weights by place. `head` is 0 when it is the embedding (tied, and not quantized)."""

    embedding: int
    layer: int
    num_layers: int
    final_norm: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.layer * self.num_layers + self.final_norm + self.head

    @property
    def read_per_token(self) -> int:
        """Bytes a decode step reads: all but the embedding table, which is looked up, unless it is the head too."""
        return self.total - (self.embedding if self.head else 0)


def native_precision(config: ModelConfig) -> str:
    """The precision that the checkpoint itself is in, as the nearest that the plan knows."""
    if config.quantization is not None:
        return f"int{config.quantization.bits}"
    gguf_types = config.tensors is not None and any(t.dtype not in DTYPE_BYTES for t in config.tensors)
    if gguf_types and config.tensors is not None:
        bits = 8 * sum(t.nbytes for t in config.tensors) / sum(math.prod(t.shape) for t in config.tensors)
        return "int4" if bits < 7 else "int8" if bits < 12 else "bf16"
    return {"float32": "fp32", "float16": "fp16"}.get(config.dtype, "bf16")


def weight_bytes(config: ModelConfig, precision: str, stack: str, on_cpu: bool = False) -> WeightBytes:
    """Bytes of the weights in `precision` as `stack` keeps them in memory.

    transformers keeps a checkpoint as it is stored; where the checkpoint's own headers are known and in this
    precision, the bytes are those, tensor by tensor. qwenfit and vLLM repack quantized layers: packed integers,
    a 16-bit scale (qwenfit on a CPU: 32-bit) per group, and only the biases that the model has. Groups are the
    checkpoint's, else 128. Zeros that are the middle code, as in Qwen's own GPTQ and after rounding to nearest, take
    nothing; those of AWQ and of asymmetric GPTQ lie beside the scales, and act-order beside each layer.
    """
    exact = config.tensors is not None and precision == native_precision(config) and _is_stored_layout(config)
    if exact and config.tensors is not None and (config.quantization is None or stack.startswith("transformers")):
        return _by_place(config.tensors, config)
    return _computed_bytes(config, precision, stack, on_cpu)


@lru_cache(maxsize=512)
def _computed_bytes(config: ModelConfig, precision: str, stack: str, on_cpu: bool) -> WeightBytes:
    """As `weight_bytes`, from the architecture alone (tensors are no part of a config's identity)."""
    if precision in ("int8", "int4") and not stack.startswith("transformers"):
        return _repacked(config, BITS[precision], stack, on_cpu)
    quantization = config.quantization
    if precision in ("int8", "int4"):
        if quantization is None or quantization.bits != BITS[precision]:
            quantization = Quantization("gptq", BITS[precision], GROUP_SIZE)
    else:
        quantization = None
    # All layers are alike: one of them is enough, and a plan stays under a millisecond.
    one_layer = replace(config, quantization=quantization, num_layers=1, tensors=None)
    return replace(
        _by_place(tuple(checkpoint_tensors(one_layer, DTYPE_OF[precision])), one_layer), num_layers=config.num_layers
    )


def _is_stored_layout(config: ModelConfig) -> bool:
    return config.tensors is not None and all(t.dtype in DTYPE_BYTES for t in config.tensors)


def _by_place(tensors: Sequence[TensorInfo], config: ModelConfig) -> WeightBytes:
    embedding = head = norm = layers = 0
    for tensor in tensors:
        if "embed_tokens" in tensor.name or ".wte." in tensor.name or tensor.name.startswith("token_embd"):
            embedding += tensor.nbytes
        elif "lm_head" in tensor.name or tensor.name.startswith("output."):
            head += tensor.nbytes
        elif "layers." in tensor.name or ".h." in tensor.name or tensor.name.startswith("blk."):
            layers += tensor.nbytes
        else:
            norm += tensor.nbytes
    per_layer, rest = divmod(layers, config.num_layers)
    return WeightBytes(embedding, per_layer, config.num_layers, norm + rest, head)


def _repacked(config: ModelConfig, bits: int, stack: str, on_cpu: bool) -> WeightBytes:
    stored = config.quantization if config.quantization is not None and config.quantization.bits == bits else None
    h = config.hidden_size
    layer = sum(
        _packed_linear(s, bits, stack, on_cpu, stored) + (2 * s.out_features if s.bias else 0)
        for s in config.layer_linears()
    )
    layer += 2 * (2 * h + (2 * config.head_dim if config.qk_norm else 0))
    table = 2 * config.embedding_parameters
    return WeightBytes(table, layer, config.num_layers, 2 * h, 0 if config.tie_word_embeddings else table)


def _packed_linear(shape: LinearShape, bits: int, stack: str, on_cpu: bool, stored: Quantization | None = None) -> int:
    """Codes, scales, and what only some checkpoints have: zeros that differ, and the order of the columns."""
    size = GROUP_SIZE if stored is None else stored.group_size
    groups = 1 if size == -1 else math.ceil(shape.in_features / size)
    total = shape.in_features * shape.out_features * bits // 8
    scale, zero = (4.0, 4.0) if on_cpu and stack == "qwenfit" else (2.0, 2.0 if stack == "qwenfit" else bits / 8)
    total += int(groups * shape.out_features * (scale + (0 if stored is None or stored.sym else zero)))
    if stored is not None and stored.desc_act and groups > 1:
        total += 8 * shape.in_features  # qwenfit: a permutation in int64; vLLM: g_idx and its order in int32
    return total


def with_head(
    config: ModelConfig, weights: WeightBytes, head_precision: str | None, on_cpu: bool = False
) -> WeightBytes:
    """The same with the head quantized by qwenfit; a tied embedding stays as it is beside it."""
    if head_precision is None:
        return weights
    head = LinearShape("lm_head", config.hidden_size, config.vocab_size, False)
    return replace(weights, head=_packed_linear(head, BITS[head_precision], "qwenfit", on_cpu))


def quantized_parameters(config: ModelConfig) -> int:
    """Weights that quantization touches: the linear layers of all blocks."""
    return config.num_layers * config.linear_parameters_per_layer


def largest_linear(config: ModelConfig) -> int:
    """Weights of the largest stored linear layer of a block."""
    return max(s.in_features * s.out_features for s in published_linears(config))


def split_layers(num_layers: int, devices: int) -> list[int]:
    """Layers per device when they are placed one after the other, as evenly as they go."""
    base, more = divmod(num_layers, devices)
    return [base + (1 if i < more else 0) for i in range(devices)]


def check_tensor_parallel(config: ModelConfig, devices: int, precision: str) -> None:
    """UsageError where heads, widths or (Int4/Int8) quantization groups do not divide over the devices.

    A row-parallel split of a GPTQ layer must fall on a group boundary: Qwen's inner widths are 43, 86, 107 and 192
    groups of 128 for 1.8B, 7B, 14B and 72B, so Int4 splits 7B over 2 and 72B over 2, 4, 8 only.
    """
    if config.num_heads % devices:
        raise UsageError(
            f"{config.num_heads} attention heads do not divide over {devices} GPUs (tensor parallel).", IN_ORDER
        )
    if config.num_kv_heads % devices and devices % config.num_kv_heads:
        raise UsageError(
            f"{config.num_kv_heads} key/value heads do not divide over {devices} GPUs (tensor parallel).", IN_ORDER
        )
    if config.intermediate_size % devices:
        raise UsageError(f"Inner width {config.intermediate_size} does not divide over {devices} GPUs.", IN_ORDER)
    group = GROUP_SIZE if config.quantization is None else config.quantization.group_size
    if BITS[precision] < 16 and group > 0:
        for what, width in (("MLP", config.intermediate_size), ("attention output", config.q_size)):
            if width % (devices * group):
                groups = math.ceil(width / group)
                raise UsageError(
                    f"The {groups} quantization groups of {config.name}'s {what} layer do not divide over "
                    f"{devices} GPUs, so {precision} tensor parallelism cuts through a group.",
                    IN_ORDER,
                )


def tensor_parallel_bytes(config: ModelConfig, weights: WeightBytes, devices: int) -> int:
    """Bytes on each of `devices` GPUs: linear layers, embedding and head are cut, norms are whole."""
    norms = 2 * config.num_layers * 2 * config.hidden_size
    whole = norms + weights.final_norm
    kv_copies = max(1, devices // config.num_kv_heads)
    kv_extra = (kv_copies - 1) * 2 * config.hidden_size * config.kv_size * 2 * config.num_layers // devices
    return whole + math.ceil((weights.total - whole) / devices) + kv_extra
