"""ModelConfig: one frozen dataclass that describes every dense Qwen, from Qwen-1 to Qwen3.

What differs between the generations is a field here, never a second model file.
The readers that make one from a catalog name, a folder, a config.json, a GGUF header or a Hub id
are in `qwenfit.checkpoint.resolve`; this file imports nothing but the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int8": 1, "uint8": 1, "int64": 8}


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint's layer linears are quantized. Embedding, norms and head stay in 16 bits."""

    method: str  # "gptq" | "awq"
    bits: int  # 4 | 8
    group_size: int = 128  # inputs that share a scale; -1: one group over all inputs
    desc_act: bool = False  # act-order: g_idx is not sorted
    sym: bool = True
    checkpoint_format: str = "gptq"  # GPTQ only: "gptq" stores zero points less one, "gptq_v2" as they are


@dataclass(frozen=True)
class YarnScaling:
    """YaRN rope scaling, applied at every length (arXiv 2309.00071; `rope_scaling` of Qwen2/2.5 configs)."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None  # None: 0.1 ln(factor) + 1
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its name, dtype (of DTYPE_BYTES, or a GGUF type name), shape, bytes, and where they lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str = field(default="", compare=False)  # empty when it was computed, or read over a network
    offset: int = field(default=0, compare=False)  # bytes from the start of the file


@dataclass(frozen=True)
class LinearShape:
    """One linear layer: y[out_features] = W[out, in] x + b."""

    name: str
    in_features: int
    out_features: int
    bias: bool


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of one dense Qwen. Sizes count elements; `context_length` counts tokens."""

    name: str
    architecture: str  # "qwen1" | "qwen2" (1.5, 2 and 2.5) | "qwen3"
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int  # the true inner width: half of what a Qwen-1 config.json prints
    vocab_size: int  # rows of the embedding, padding rows included
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool  # Qwen3: RMSNorm over each head of q and k, before the rotation
    rms_norm_eps: float
    rope_theta: float
    context_length: int  # the longest prompt + answer that the model is published for
    training_length: int  # Qwen-1's seq_length: the S of dynamic NTK and LogN
    use_dynamic_ntk: bool = False
    use_logn_attn: bool = False
    yarn: YarnScaling | None = None
    dtype: str = "bfloat16"
    quantization: Quantization | None = None
    source: str = ""
    tensors: tuple[TensorInfo, ...] | None = field(default=None, repr=False, compare=False)  # the checkpoint's headers

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of keys and values that one token leaves in the cache, over all layers."""
        return 2 * self.num_layers * self.kv_size

    def layer_linears(self) -> tuple[LinearShape, ...]:
        """The four fused linear layers of one block: these are what quantization and LoRA touch."""
        h, m = self.hidden_size, self.intermediate_size
        return (
            LinearShape("qkv_proj", h, self.q_size + 2 * self.kv_size, self.qkv_bias),
            LinearShape("o_proj", self.q_size, h, False),
            LinearShape("gate_up_proj", h, 2 * m, False),
            LinearShape("down_proj", m, h, False),
        )

    @property
    def linear_parameters_per_layer(self) -> int:
        """Weights (no biases) of one block's linear layers."""
        return sum(s.in_features * s.out_features for s in self.layer_linears())

    @property
    def embedding_parameters(self) -> int:
        """Rows x width of the input embedding; the head has as many, shared when tied."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters, a tied head counted once. Qwen-72B: 72,287,920,128."""
        small = sum(s.out_features for s in self.layer_linears() if s.bias) + 2 * self.hidden_size
        if self.qk_norm:
            small += 2 * self.head_dim
        layers = self.num_layers * (self.linear_parameters_per_layer + small)
        tables = self.embedding_parameters * (1 if self.tie_word_embeddings else 2)
        return layers + tables + self.hidden_size

    def ntk_alpha(self, prompt_length: int) -> float:
        """Qwen-1's dynamic NTK factor for a prompt (modeling_qwen.py, Nov-2023 release): 1, 3, 7, 15, ...

        The rotary base becomes rope_theta * alpha ** (head_dim / (head_dim - 2)). It is fixed by the prompt and
        kept while decoding, since keys are cached after rotation.
        """
        if not self.use_dynamic_ntk or prompt_length <= self.training_length:
            return 1.0
        return float(max(2 ** math.ceil(math.log2(prompt_length / self.training_length) + 1) - 1, 1))


def checkpoint_tensors(config: ModelConfig, dtype: str = "bfloat16") -> Iterator[TensorInfo]:
    """Every tensor of the published checkpoint, computed from the architecture, under canonical names.

    With `config.quantization` of method gptq each layer linear becomes qweight, qzeros, scales, g_idx and a bias
    (AutoGPTQ stores a bias for every layer, also where it is zero); embedding, norms and head stay 16-bit.
    qkv and gate_up count as the published parts (c_attn is one tensor; w1 and w2 are two with a g_idx each).
    """
    h = config.hidden_size

    def plain(name: str, *shape: int) -> TensorInfo:
        return TensorInfo(name, dtype, shape, math.prod(shape) * DTYPE_BYTES[dtype])

    yield plain("embed_tokens.weight", config.vocab_size, h)
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}."
        yield plain(prefix + "input_layernorm.weight", h)
        yield plain(prefix + "post_attention_layernorm.weight", h)
        if config.qk_norm:
            yield plain(prefix + "q_norm.weight", config.head_dim)
            yield plain(prefix + "k_norm.weight", config.head_dim)
        for shape in published_linears(config):
            if config.quantization is None:
                yield plain(prefix + shape.name + ".weight", shape.out_features, shape.in_features)
                if shape.bias:
                    yield plain(prefix + shape.name + ".bias", shape.out_features)
            else:
                yield from _quantized_tensors(prefix + shape.name, shape, config.quantization, dtype)
    yield plain("norm.weight", h)
    if not config.tie_word_embeddings:
        yield plain("lm_head.weight", config.vocab_size, h)


def published_linears(config: ModelConfig) -> tuple[LinearShape, ...]:
    """The linear layers of one block as the checkpoint stores them: fused c_attn in Qwen-1, separate q, k, v later."""
    h, m = config.hidden_size, config.intermediate_size
    qkv: tuple[LinearShape, ...]
    if config.architecture == "qwen1":
        qkv = (LinearShape("attn.c_attn", h, 3 * config.q_size, config.qkv_bias),)
    else:
        qkv = (
            LinearShape("self_attn.q_proj", h, config.q_size, config.qkv_bias),
            LinearShape("self_attn.k_proj", h, config.kv_size, config.qkv_bias),
            LinearShape("self_attn.v_proj", h, config.kv_size, config.qkv_bias),
        )
    return (
        *qkv,
        LinearShape("self_attn.o_proj", config.q_size, h, False),
        LinearShape("mlp.gate_proj", h, m, False),
        LinearShape("mlp.up_proj", h, m, False),
        LinearShape("mlp.down_proj", m, h, False),
    )


def _quantized_tensors(name: str, shape: LinearShape, quantization: Quantization, dtype: str) -> Iterator[TensorInfo]:
    """GPTQ as AutoGPTQ packs it; AWQ packs along the outputs and has neither g_idx nor an added bias."""
    bits, n_in, n_out = quantization.bits, shape.in_features, shape.out_features
    half = "float16" if dtype == "bfloat16" else dtype
    groups = 1 if quantization.group_size == -1 else math.ceil(n_in / quantization.group_size)

    def make(part: str, dt: str, *dims: int) -> TensorInfo:
        return TensorInfo(f"{name}.{part}", dt, dims, math.prod(dims) * DTYPE_BYTES[dt])

    if quantization.method == "awq":
        yield make("qweight", "int32", n_in, n_out * bits // 32)
    else:
        yield make("qweight", "int32", n_in * bits // 32, n_out)
    yield make("qzeros", "int32", groups, n_out * bits // 32)
    yield make("scales", half, groups, n_out)
    if quantization.method == "gptq":
        yield make("g_idx", "int32", n_in)
    if shape.bias or quantization.method == "gptq":
        yield make("bias", half, n_out)
