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


def gguf_writer(path: Path, config: dict):
    """(a GGUF writer with the metadata of a config.json, without a vocabulary, and the names that tensors have)."""
    import gguf

    arch = config["model_type"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_rope_freq_base(config.get("rope_theta") or config["rotary_emb_base"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps") or config["layer_norm_epsilon"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if scaling := config.get("rope_scaling"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    return writer, gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], layers)


def finish_gguf(writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_random_gguf(path: Path, config: dict, types: list[str]) -> Path:
    """A Qwen2 whose matrices are random bytes of the quantized types in turn, with scales that are small numbers."""
    import gguf
    import numpy as np

    rng = np.random.default_rng(0)
    writer, names = gguf_writer(path, config)
    matrices = 0
    for name, tensor in qwen2_tensors(config, torch.float32).items():
        stored = names.get_name(name, (".weight", ".bias"))
        if tensor.ndim == 1:
            writer.add_tensor(stored, tensor.numpy())
            continue
        kind = gguf.GGMLQuantizationType[types[matrices % len(types)]]
        elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
        blocks = rng.integers(0, 256, (tensor.numel() // elements, nbytes), dtype=np.uint8)
        for at in HALVES[kind.name]:
            blocks[:, at : at + 2] = np.array([0.001], np.float16).view(np.uint8)
        writer.add_tensor(stored, blocks.reshape(tensor.shape[0], -1), raw_dtype=kind)
        matrices += 1
    finish_gguf(writer)
    return path


# Where the float16 numbers of a block lie.
HALVES = {name: [0] for name in ("Q4_0", "Q5_0", "Q8_0")} | {name: [0, 2] for name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")}
HALVES |= {"Q2_K": [80, 82], "Q3_K": [108], "Q6_K": [208]}


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
