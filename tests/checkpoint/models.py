"""Tiny checkpoints made on the spot, and the network run on token ids."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qwenfit.model.batch import Chunk, make_batch
from qwenfit.model.kv_cache import KVCache


def prompt_logits(model, ids, positions):
    """Logits at `positions` of one prompt, with the NTK alpha of its length."""
    with torch.inference_mode():
        hidden = model.forward_full(torch.as_tensor(ids).long()[None])
        return model.logits(hidden[0, torch.as_tensor(positions).long()])


def greedy(model, ids, count):
    """`count` greedy tokens after a prompt, with a float32 cache, and the logits that chose them."""
    blocks = -(-(len(ids) + count) // 16)
    cache = KVCache(model.config, blocks, 16, "fp32")
    alpha, new, rows, cached, step = model.config.ntk_alpha(len(ids)), [], [], 0, [int(i) for i in ids]
    for _ in range(count):
        batch = make_batch([Chunk(step, cached, range(blocks), alpha)], 16)
        logits = model.logits(model(batch, cache)[batch.logits_indices])
        cached += len(step)
        step = [int(logits.argmax())]
        rows.append(logits)
        new += step
    return new, torch.cat(rows)


def read_model(folder: Path):
    """(config.json as a dict, the tensors of a one-file folder)."""
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def write_model(folder: Path, config: dict, tensors: dict, shards: int = 1) -> Path:
    """A checkpoint folder, the tensors dealt over `shards` files with an index when there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[i::shards]}
        save_file(part, folder / name, {"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def qwen2_config(**changes) -> dict:
    table = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 256,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 320,
    }
    return {**table, **changes}


def qwen2_tensors(config: dict, dtype=torch.bfloat16, seed=0) -> dict:
    """Random weights of moderate size under the published names."""
    generator = torch.Generator().manual_seed(seed)
    h, m, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, h)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {p + "input_layernorm.weight": (h,), p + "post_attention_layernorm.weight": (h,)}
        for name, rows in (("q", h), ("k", kv), ("v", kv)):
            shapes |= {p + f"self_attn.{name}_proj.weight": (rows, h), p + f"self_attn.{name}_proj.bias": (rows,)}
        shapes |= {p + "self_attn.o_proj.weight": (h, h), p + "mlp.down_proj.weight": (h, m)}
        shapes |= {p + "mlp.gate_proj.weight": (m, h), p + "mlp.up_proj.weight": (m, h)}
    return {name: _random(shape, generator).to(dtype) for name, shape in shapes.items()}


def _random(shape, generator):
    if len(shape) == 1:
        return 1 + 0.1 * torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) * 1.5 * shape[1] ** -0.5
