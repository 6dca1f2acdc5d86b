"""Tensor names as data: how each published layout names the canonical parameters, and which rows of them it stores.

A canonical parameter is the concatenation, along the output rows, of the tensors that a checkpoint stores: Qwen2's
q_proj, k_proj and v_proj are rows of one qkv_proj, Qwen-1's w2 (the gate) and w1 (the up) rows of one gate_up_proj.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qwenfit.config import ModelConfig

# Canonical module -> stored modules, in row order. `{}` is the layer number.
Layout = dict[str, tuple[str, ...]]

# modeling_qwen.py of the Nov-2023 release: c_attn is [q | k | v]; the MLP is c_proj(w1(x) * silu(w2(x))).
QWEN1: Layout = {
    "embed_tokens": ("transformer.wte",),
    "layers.{}.input_layernorm": ("transformer.h.{}.ln_1",),
    "layers.{}.post_attention_layernorm": ("transformer.h.{}.ln_2",),
    "layers.{}.self_attn.qkv_proj": ("transformer.h.{}.attn.c_attn",),
    "layers.{}.self_attn.o_proj": ("transformer.h.{}.attn.c_proj",),
    "layers.{}.mlp.gate_up_proj": ("transformer.h.{}.mlp.w2", "transformer.h.{}.mlp.w1"),
    "layers.{}.mlp.down_proj": ("transformer.h.{}.mlp.c_proj",),
    "norm": ("transformer.ln_f",),
    "lm_head": ("lm_head",),
}

# Qwen1.5, 2, 2.5 and 3 as transformers publishes them.
QWEN2: Layout = {
    "embed_tokens": ("model.embed_tokens",),
    "layers.{}.input_layernorm": ("model.layers.{}.input_layernorm",),
    "layers.{}.post_attention_layernorm": ("model.layers.{}.post_attention_layernorm",),
    "layers.{}.self_attn.qkv_proj": (
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.k_proj",
        "model.layers.{}.self_attn.v_proj",
    ),
    "layers.{}.self_attn.q_norm": ("model.layers.{}.self_attn.q_norm",),
    "layers.{}.self_attn.k_norm": ("model.layers.{}.self_attn.k_norm",),
    "layers.{}.self_attn.o_proj": ("model.layers.{}.self_attn.o_proj",),
    "layers.{}.mlp.gate_up_proj": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "layers.{}.mlp.down_proj": ("model.layers.{}.mlp.down_proj",),
    "norm": ("model.norm",),
    "lm_head": ("lm_head",),
}

# llama.cpp's names (gguf/constants.py, MODEL_TENSORS). Qwen needs no permutation of q and k: NeoX rotation there too.
GGUF_QWEN2: Layout = {
    "embed_tokens": ("token_embd",),
    "layers.{}.input_layernorm": ("blk.{}.attn_norm",),
    "layers.{}.post_attention_layernorm": ("blk.{}.ffn_norm",),
    "layers.{}.self_attn.qkv_proj": ("blk.{}.attn_q", "blk.{}.attn_k", "blk.{}.attn_v"),
    "layers.{}.self_attn.q_norm": ("blk.{}.attn_q_norm",),
    "layers.{}.self_attn.k_norm": ("blk.{}.attn_k_norm",),
    "layers.{}.self_attn.o_proj": ("blk.{}.attn_output",),
    "layers.{}.mlp.gate_up_proj": ("blk.{}.ffn_gate", "blk.{}.ffn_up"),
    "layers.{}.mlp.down_proj": ("blk.{}.ffn_down",),
    "norm": ("output_norm",),
    "lm_head": ("output",),
}
GGUF_QWEN1: Layout = {**GGUF_QWEN2, "layers.{}.self_attn.qkv_proj": ("blk.{}.attn_qkv",)}

# Buffers that old exports carry and no network needs: recomputed from the config.
IGNORED = re.compile(r"(.*\.rotary_emb\.inv_freq|.*\.attn\.(masked_bias|logn_tensor)|rope_freqs\.weight)")


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a canonical module are the whole of the stored module."""

    stored: str
    start: int
    stop: int


def layout_of(config: ModelConfig, gguf: bool) -> Layout:
    """The layout that a checkpoint of this architecture is stored in."""
    if config.architecture == "qwen1":
        return GGUF_QWEN1 if gguf else QWEN1
    return GGUF_QWEN2 if gguf else QWEN2


def canonical_parameters(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the network and its shape, in the order of the layers. A tied head is absent."""
    h, m = config.hidden_size, config.intermediate_size
    qkv = config.q_size + 2 * config.kv_size
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (config.vocab_size, h)}
    for layer in range(config.num_layers):
        p = f"layers.{layer}."
        shapes[p + "input_layernorm.weight"] = (h,)
        shapes[p + "self_attn.qkv_proj.weight"] = (qkv, h)
        if config.qkv_bias:
            shapes[p + "self_attn.qkv_proj.bias"] = (qkv,)
        if config.qk_norm:
            shapes[p + "self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[p + "self_attn.k_norm.weight"] = (config.head_dim,)
        shapes[p + "self_attn.o_proj.weight"] = (h, config.q_size)
        shapes[p + "post_attention_layernorm.weight"] = (h,)
        shapes[p + "mlp.gate_up_proj.weight"] = (2 * m, h)
        shapes[p + "mlp.down_proj.weight"] = (h, m)
    shapes["norm.weight"] = (h,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, h)
    return shapes


def is_layer_linear(parameter: str) -> bool:
    """Whether a canonical parameter is the weight of one of a block's four linear layers (what is quantized)."""
    return parameter.endswith("_proj.weight")


def pieces_of(module: str, rows: int, config: ModelConfig, layout: Layout) -> tuple[Piece, ...]:
    """The stored modules that make up a canonical module of `rows` output rows, in row order.

    `module` is without its last part: `layers.3.mlp.gate_up_proj`, not `layers.3.mlp.gate_up_proj.weight`.
    """
    template, layer = split_layer(module)
    stored = layout[template]
    if len(stored) == 1:
        sizes: tuple[int, ...] = (rows,)
    elif template.endswith("qkv_proj"):
        sizes = (config.q_size, config.kv_size, config.kv_size)
    else:
        sizes = (config.intermediate_size, config.intermediate_size)
    pieces, start = [], 0
    for name, size in zip(stored, sizes, strict=True):
        pieces.append(Piece(name.format(layer), start, start + size))
        start += size
    return tuple(pieces)


def split_layer(module: str) -> tuple[str, str]:
    """`layers.3.mlp.down_proj` -> (`layers.{}.mlp.down_proj`, `3`); a module outside the blocks has layer ``."""
    first, _, rest = module.partition(".")
    if first != "layers":
        return module, ""
    layer, _, tail = rest.partition(".")
    return f"layers.{{}}.{tail}", layer
