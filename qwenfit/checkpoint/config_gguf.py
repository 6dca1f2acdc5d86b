"""GGUF header -> ModelConfig, for general.architecture qwen, qwen2 and qwen3.

Keys: ggml-org/ggml, docs/gguf.md, and the Qwen converters of ggml-org/llama.cpp, convert_hf_to_gguf.py.
"""

from __future__ import annotations

from dataclasses import replace

from qwenfit.checkpoint.bounded import shown
from qwenfit.checkpoint.config_json import FAMILIES, published_qwen1
from qwenfit.checkpoint.fields import (
    MAX_CONTEXT,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_INNER,
    MAX_LAYERS,
    Fields,
    check_sizes,
)
from qwenfit.checkpoint.headers_gguf import GGUFHeader
from qwenfit.config import ModelConfig, TensorInfo, YarnScaling
from qwenfit.errors import UsageError


def config_from_gguf(header: GGUFHeader) -> ModelConfig:
    """The ModelConfig of a GGUF file, its tensors included, so that weight bytes are exact.

    Sizes that the tensors show are taken from them: the vocabulary, Qwen-1's inner width, a tied head. Raises
    BadFile when a key is missing or contradicts the tensors, UsageError for another architecture.
    """
    fields = Fields(header.metadata, f"The header of {shown(header.path)}")
    arch = fields.word("general.architecture")
    if arch not in FAMILIES:
        raise UsageError(f"{fields.what} names the architecture {shown(arch)}; qwenfit reads qwen, qwen2 and qwen3.")
    if fields.integer("split.count", least=0, most=65_535, default=0) > 1:
        raise UsageError(
            f"{shown(header.path)} is one part of several of a split GGUF.",
            "Join the parts: llama-gguf-split --merge FIRST_PART OUT.gguf",
        )
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    hidden = fields.integer(f"{arch}.embedding_length", most=MAX_HIDDEN)
    heads = fields.integer(f"{arch}.attention.head_count", most=MAX_HEADS)
    vocab_size, _ = _matrix(fields, shapes, "token_embd.weight", columns=hidden)
    inner, _ = _matrix(fields, shapes, "blk.0.ffn_gate.weight", columns=hidden)
    printed = fields.integer(f"{arch}.feed_forward_length", most=2 * MAX_INNER)
    if printed != inner and not (arch == "qwen" and printed == 2 * inner):
        raise fields.bad(f"has a feed_forward_length of {printed:,} and a gate of {inner:,} rows")
    if f"{arch}.attention.key_length" not in fields.table and hidden % heads:
        raise fields.bad(f"has an embedding_length of {hidden}, which its {heads} attention heads do not divide")
    context = fields.integer(f"{arch}.context_length", most=MAX_CONTEXT)
    yarn = _yarn(fields, f"{arch}.rope.scaling.", context)
    if yarn is not None:
        context = int(yarn.factor * yarn.original_max_position_embeddings)
    config = ModelConfig(
        name=header.path.stem,
        architecture=FAMILIES[arch],
        hidden_size=hidden,
        num_layers=fields.integer(f"{arch}.block_count", most=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=fields.integer(f"{arch}.attention.head_count_kv", most=MAX_HEADS, default=heads),
        head_dim=fields.integer(f"{arch}.attention.key_length", most=MAX_HEAD_DIM, default=hidden // heads),
        intermediate_size=inner,
        vocab_size=vocab_size,
        tie_word_embeddings="output.weight" not in shapes,
        qkv_bias=arch != "qwen3",
        qk_norm=arch == "qwen3",
        rms_norm_eps=_decimal(fields.number(f"{arch}.attention.layer_norm_rms_epsilon", least=1e-12, most=0.1)),
        rope_theta=_decimal(fields.number(f"{arch}.rope.freq_base", least=1.0, most=1e12, default=10000.0)),
        context_length=context,
        training_length=yarn.original_max_position_embeddings if yarn else context,
        yarn=yarn,
        dtype={"F32": "float32", "F16": "float16"}.get(_embedding_type(header), "bfloat16"),
        source=str(header.path),
        tensors=tuple(
            TensorInfo(t.name, t.type_name, t.shape, t.nbytes, str(header.path), t.offset) for t in header.tensors
        ),
    )
    return check_sizes(_with_ntk(config), fields)


def _with_ntk(config: ModelConfig) -> ModelConfig:
    """A GGUF of Qwen-1 does not store seq_length, NTK and LogN: they are those of the published model of its shape."""
    published = published_qwen1(config) if config.architecture == "qwen1" else None
    if published is None:
        return config
    return replace(
        config,
        training_length=published.training_length,
        use_dynamic_ntk=published.use_dynamic_ntk,
        use_logn_attn=published.use_logn_attn,
        context_length=max(config.context_length, published.context_length),
    )


def _matrix(fields: Fields, shapes: dict[str, tuple[int, ...]], name: str, columns: int) -> tuple[int, ...]:
    shape = shapes.get(name, ())
    if len(shape) != 2 or shape[1] != columns or not 1 <= shape[0] <= MAX_INNER:
        raise fields.bad(f"describes no tensor {name} of {columns:,} columns")
    return shape


def _yarn(fields: Fields, prefix: str, context: int) -> YarnScaling | None:
    kind = fields.word(prefix + "type", default="none")
    if kind == "none":
        return None
    if kind != "yarn" or prefix + "attn_factor" in fields.table:
        raise UsageError(f"{fields.what} asks for rope scaling {shown(kind)} in a way that no published Qwen does.")
    return YarnScaling(
        factor=fields.number(prefix + "factor", least=1.0, most=10_000.0),
        original_max_position_embeddings=fields.integer(
            prefix + "original_context_length", most=MAX_CONTEXT, default=context
        ),
        beta_fast=fields.number(prefix + "yarn_beta_fast", least=1e-6, most=1e6, default=32.0),
        beta_slow=fields.number(prefix + "yarn_beta_slow", least=1e-6, most=1e6, default=1.0),
    )


def _embedding_type(header: GGUFHeader) -> str:
    return next(tensor.type_name for tensor in header.tensors if tensor.name == "token_embd.weight")


def _decimal(value: float) -> float:
    """A float32 as the decimal that it was written as: 9.999999974752427e-07 is 1e-06."""
    return float(f"{value:.7g}")
