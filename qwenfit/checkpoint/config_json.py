"""config.json -> ModelConfig, for Qwen-1 in both its key styles and for qwen2 (1.5, 2, 2.5) and qwen3.

Keys: configuration_qwen.py of the Qwen-72B release (mapengAdam/qianwen-72B@3334bfe) and of the first Qwen-7B-Chat
(undefdev/Qwen-7B-Chat@26fad65); configuration_qwen2.py and configuration_qwen3.py of transformers 4 and 5.
`auto_map` names remote code, which is never fetched or run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwenfit import catalog
from qwenfit.checkpoint.bounded import read_json_object, shown
from qwenfit.checkpoint.fields import (
    MAX_CONTEXT,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_HIDDEN,
    MAX_INNER,
    MAX_LAYERS,
    MAX_VOCAB,
    Fields,
    check_sizes,
)
from qwenfit.config import ModelConfig, Quantization, YarnScaling
from qwenfit.errors import UsageError

FAMILIES = {"qwen": "qwen1", "qwen2": "qwen2", "qwen3": "qwen3"}  # model_type -> ModelConfig.architecture
CAUSAL_CLASSES = {"QWenLMHeadModel": "qwen", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
# A key that only a model qwenfit does not handle has -> what such a model is.
FOREIGN_KEYS = {
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "moe_intermediate_size": "a mixture of experts",
    "visual": "a vision-language model",
    "vision_config": "a vision-language model",
    "audio": "an audio model",
    "audio_config": "an audio model",
}
OTHER_FILES = "Take the model's 16-bit, GPTQ or AWQ files."
DTYPES = ("bfloat16", "float16", "float32")


def read_config_json(path: Path | str) -> dict[str, Any]:
    """The object in a config.json. Raises NotFound, or BadFile for anything but at most 4 MiB of strict JSON."""
    return read_json_object(Path(path))


def config_from_dict(table: Mapping[str, Any], name: str, source: str = "") -> ModelConfig:
    """The ModelConfig that a config.json describes; `name` is what the model is called from here on.

    Raises BadFile when a value is missing, mistyped, absurd or contradicts another, and UsageError for a model
    or a feature that is understood but not handled: mixtures of experts, vision, sliding windows, other quantizers.
    """
    fields = Fields(table, f"The config of {shown(name)}")
    model_type = _model_type(fields)
    config = _qwen1(fields, name) if model_type == "qwen" else _qwen2_or_3(fields, name, model_type)
    return replace(check_sizes(config, fields), quantization=read_quantization(fields), source=source)


def _refuse(fields: Fields, reason: str) -> UsageError:
    hint = "qwenfit models lists them."
    return UsageError(f"{fields.what} {reason}; qwenfit handles the dense Qwen language models only.", hint)


def _model_type(fields: Fields) -> str:
    """qwen, qwen2 or qwen3; everything else is refused by its name."""
    _, classes = fields.get("architectures", default=[])
    if not isinstance(classes, list) or not all(isinstance(c, str) for c in classes):
        raise fields.bad("has architectures that are not a list of names")
    model_type = fields.word("model_type", default=CAUSAL_CLASSES.get(classes[0], "") if classes else "")
    if not model_type:
        raise fields.bad("has neither a model_type nor a known name in architectures")
    if model_type not in FAMILIES:
        raise _refuse(fields, f"is of the type {shown(model_type)}")
    for key, kind in FOREIGN_KEYS.items():
        if fields.table.get(key):
            raise _refuse(fields, f"has {key}, so it is {kind}")
    if classes and CAUSAL_CLASSES.get(classes[0]) != model_type:
        raise _refuse(fields, f"is a {shown(classes[0])} of type {shown(model_type)}")
    return model_type


def _qwen1(fields: Fields, name: str) -> ModelConfig:
    _require(fields, "activation", "swiglu")
    _require(fields, "no_bias", True)
    _require(fields, "rotary_pct", 1.0)
    _require(fields, "seq_length_expansion", 1)
    hidden = fields.integer("hidden_size", "n_embd", most=MAX_HIDDEN)
    heads = fields.integer("num_attention_heads", "n_head", most=MAX_HEADS)
    head_dim = fields.integer("kv_channels", most=MAX_HEAD_DIM, default=_even_split(fields, hidden, heads))
    if head_dim * heads != hidden:
        raise fields.bad(f"has {heads} heads of {head_dim}, which do not make up its hidden_size of {hidden}")
    inner_key, _ = fields.get("intermediate_size", "ffn_hidden_size")
    doubled = fields.integer(inner_key, least=2, most=2 * MAX_INNER)
    if doubled % 2:
        raise fields.bad(f"has an odd {inner_key} of {doubled}, where Qwen-1 prints twice the width")
    config = ModelConfig(
        name=name,
        architecture="qwen1",
        hidden_size=hidden,
        num_layers=fields.integer("num_hidden_layers", "n_layer", most=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        intermediate_size=doubled // 2,
        vocab_size=fields.integer("padded_vocab_size", "vocab_size", most=MAX_VOCAB),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        qkv_bias=True,
        qk_norm=False,
        rms_norm_eps=fields.number("layer_norm_epsilon", least=1e-12, most=0.1, default=1e-6),
        rope_theta=fields.number("rotary_emb_base", least=1.0, most=1e12, default=10000.0),
        context_length=fields.integer("max_position_embeddings", "n_positions", most=MAX_CONTEXT),
        training_length=fields.integer("seq_length", most=MAX_CONTEXT),
        use_dynamic_ntk=fields.flag("use_dynamic_ntk", default=True),
        use_logn_attn=fields.flag("use_logn_attn", default=True),
        dtype=_dtype(fields),
    )
    published = published_qwen1(config)
    if published is None or not config.use_dynamic_ntk or published.training_length != config.training_length:
        return config
    # The first releases print 8192 there; the README publishes these models for more, by NTK and LogN.
    return replace(config, context_length=max(config.context_length, published.context_length))


def published_qwen1(config: ModelConfig) -> ModelConfig | None:
    """The published Qwen-1 of the same shape, for the facts that a file of it may leave out."""

    def shape(c: ModelConfig) -> tuple[int, ...]:
        return c.hidden_size, c.num_layers, c.num_heads, c.intermediate_size, c.vocab_size

    names = ("Qwen-1.8B", "Qwen-7B", "Qwen-14B", "Qwen-72B")
    return next((c for c in map(catalog.get_model, names) if shape(c) == shape(config)), None)


def _qwen2_or_3(fields: Fields, name: str, model_type: str) -> ModelConfig:
    qwen3 = model_type == "qwen3"
    _require(fields, "hidden_act", "silu")
    _require(fields, "use_sliding_window", False)
    _require(fields, "attention_bias", not qwen3)
    _, layer_types = fields.get("layer_types", default=[])
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise _refuse(fields, "has layer_types other than full_attention")
    hidden = fields.integer("hidden_size", most=MAX_HIDDEN)
    heads = fields.integer("num_attention_heads", most=MAX_HEADS)
    head_dim = 128 if qwen3 else _even_split(fields, hidden, heads)  # Qwen3Config's default is 128
    context = fields.integer("max_position_embeddings", most=MAX_CONTEXT)
    rope_theta, yarn = _rope(fields, context)
    if yarn is not None:
        context = int(yarn.factor * yarn.original_max_position_embeddings)
    return ModelConfig(
        name=name,
        architecture=FAMILIES[model_type],
        hidden_size=hidden,
        num_layers=fields.integer("num_hidden_layers", most=MAX_LAYERS),
        num_heads=heads,
        num_kv_heads=fields.integer("num_key_value_heads", most=MAX_HEADS, default=heads),
        head_dim=fields.integer("head_dim", most=MAX_HEAD_DIM, default=head_dim),
        intermediate_size=fields.integer("intermediate_size", most=MAX_INNER),
        vocab_size=fields.integer("vocab_size", most=MAX_VOCAB),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        qkv_bias=not qwen3,
        qk_norm=qwen3,
        rms_norm_eps=fields.number("rms_norm_eps", least=1e-12, most=0.1, default=1e-6),
        rope_theta=rope_theta,
        context_length=context,
        training_length=yarn.original_max_position_embeddings if yarn else context,
        yarn=yarn,
        dtype=_dtype(fields),
    )


def _require(fields: Fields, key: str, only: Any) -> None:
    """A switch that every dense Qwen sets one way: absent is fine, set otherwise is refused by name."""
    _, value = fields.get(key, default=only)
    if value != only or isinstance(value, bool) != isinstance(only, bool):
        raise _refuse(fields, f"sets {key} to {shown(value)}")


def _even_split(fields: Fields, hidden: int, heads: int) -> int | None:
    """The head size when the config names none. A head size that is named need not divide hidden_size."""
    if fields.table.get("head_dim") is None and fields.table.get("kv_channels") is None and hidden % heads:
        raise fields.bad(f"has a hidden_size of {hidden}, which its {heads} attention heads do not divide")
    return hidden // heads


def _rope(fields: Fields, context: int) -> tuple[float, YarnScaling | None]:
    """(theta, YaRN or None), from rope_theta and rope_scaling, or from rope_parameters (transformers 5)."""
    scaling = fields.nested("rope_parameters")
    theta_fields = fields
    if scaling is None:
        scaling = fields.nested("rope_scaling")
    elif scaling.table.get("rope_theta") is not None:
        theta_fields = scaling
    theta = theta_fields.number("rope_theta", least=1.0, most=1e12, default=10000.0)
    if scaling is None:
        return theta, None
    kind = scaling.word("rope_type", "type", default="default")
    _require(scaling, "partial_rotary_factor", 1.0)
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise _refuse(scaling, f"is of the type {shown(kind)}")
    for key in ("mscale", "mscale_all_dim", "truncate"):
        if scaling.table.get(key) is not None:
            raise _refuse(scaling, f"sets {key}, which no Qwen does")
    named = scaling.table.get("attention_factor") is not None
    factor = scaling.number("attention_factor", least=1e-6, most=1e6) if named else None
    return theta, YarnScaling(
        factor=scaling.number("factor", least=1.0, most=10_000.0),
        original_max_position_embeddings=scaling.integer(
            "original_max_position_embeddings", most=MAX_CONTEXT, default=context
        ),
        attention_factor=factor,
        beta_fast=scaling.number("beta_fast", least=1e-6, most=1e6, default=32.0),
        beta_slow=scaling.number("beta_slow", least=1e-6, most=1e6, default=1.0),
    )


def _dtype(fields: Fields) -> str:
    """torch_dtype (dtype since transformers 5), else Qwen-1's bf16, fp16 and fp32 switches, else bfloat16."""
    word = fields.word("dtype", "torch_dtype", default="").removeprefix("torch.")
    if word in DTYPES:
        return word
    if word not in ("", "auto"):
        raise _refuse(fields, f"stores its weights in {shown(word)}")
    for key, dtype in zip(("bf16", "fp16", "fp32"), DTYPES, strict=True):
        if fields.table.get(key) is True:
            return dtype
    return "bfloat16"


def read_quantization(fields: Fields) -> Quantization | None:
    """quantization_config of GPTQ and AWQ; every other method is refused by its name."""
    section = fields.nested("quantization_config")
    return None if section is None else quantization_from(section)


def quantization_from(section: Fields) -> Quantization:
    """A quantization_config, or AutoGPTQ's quantize_config.json, which names no method."""
    method = section.word("quant_method", default="gptq").lower()
    if method not in ("gptq", "awq"):
        raise UsageError(
            f"{section.what} names the method {shown(method)}; qwenfit reads GPTQ and AWQ.",
            OTHER_FILES,
        )
    _require(section, "lm_head", False)
    if section.table.get("dynamic"):
        raise UsageError(f"{section.what} has rules per layer (dynamic), which qwenfit does not read.", OTHER_FILES)
    bits = section.integer("bits", "w_bit", most=32)
    if bits not in ((4, 8) if method == "gptq" else (4,)):
        raise UsageError(
            f"{section.what} asks for {bits} bits, which qwenfit does not run with {method.upper()}.", OTHER_FILES
        )
    group_size = section.integer("group_size", "q_group_size", least=-1, most=MAX_INNER, default=128)
    if group_size == 0:
        raise section.bad("has a group_size of 0")
    if method == "awq":
        if (version := section.word("version", default="gemm").lower()) != "gemm":
            raise UsageError(
                f"{section.what} packs its weights as {shown(version)}; of AWQ qwenfit reads gemm.", OTHER_FILES
            )
        return Quantization("awq", bits, group_size, False, not section.flag("zero_point", default=True))
    layout = section.word("checkpoint_format", default="gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise UsageError(
            f"{section.what} packs its weights as {shown(layout)}; of GPTQ qwenfit reads gptq and gptq_v2.",
            OTHER_FILES,
        )
    desc_act, sym = section.flag("desc_act", default=False), section.flag("sym", default=True)
    return Quantization("gptq", bits, group_size, desc_act, sym, layout)
