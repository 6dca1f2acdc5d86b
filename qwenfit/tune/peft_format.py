"""Adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors, under the checkpoint's own names.

The names are those of a checkpoint of the model's architecture: q_proj, ... for Qwen1.5 and later; c_attn, c_proj, w1
and w2 for Qwen-1. Key formats: huggingface/peft v0.21.2, utils/save_and_load.py and utils/other.py.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwenfit.checkpoint.bounded import read_json_object, shown
from qwenfit.checkpoint.names import Layout, layout_of, pieces_of
from qwenfit.config import ModelConfig
from qwenfit.errors import BadFile, NotFound, UsageError
from qwenfit.model.linear import Linear
from qwenfit.model.transformer import Transformer
from qwenfit.tune.adapters import (
    LINEARS,
    LoRA,
    LoRALinear,
    adapted_linears,
    head_weight,
    lora_layers,
    merge_into,
    token_rows,
)

CONFIG_NAME, WEIGHTS_NAME, RECORD_NAME = "adapter_config.json", "adapter_model.safetensors", "qwenfit.json"
PREFIX = "base_model.model."
ROWS = ".token_adapter.trainable_tokens_delta"
MAX_RANK = 65536

# adapter_config.json fields that change the arithmetic, and the value under which this file has it right.
NOT_DONE: dict[str, Any] = {
    "bias": "none",
    "use_dora": False,
    "use_qalora": False,
    "use_bdlora": None,
    "fan_in_fan_out": False,
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": None,
    "alpha_pattern": {},
    "rank_pattern": {},
    "alora_invocation_tokens": None,
}


@dataclass
class Adapter:
    """An adapter folder as read: canonical modules' parts, whole tables and single rows of tables."""

    lora: LoRA
    downs: dict[str, list[Tensor | None]]  # canonical linear -> A [rank, in] of each part; None: not adapted
    ups: dict[str, list[Tensor | None]]  # canonical linear -> B [rows of the part, rank]
    tables: dict[str, Tensor]  # "embed_tokens" | "lm_head" -> [vocab, hidden]
    rows: dict[str, tuple[list[int], Tensor]]  # "embed_tokens" | "lm_head" -> (ids, [ids, hidden])
    base: str  # the base model as the adapter names it; "" if it does not
    record: dict[str, Any] = field(default_factory=dict)  # qwenfit.json, when qwenfit wrote the adapter


def write_adapter(
    folder: Path, model: Transformer, lora: LoRA, base: str, record: dict[str, Any] | None = None
) -> list[Path]:
    """Write the model's adapters and trained tables or rows into an existing folder; returns the files written."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in adapter_tensors(model).items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(adapter_config(model, lora, base), indent=2) + "\n")
    (folder / RECORD_NAME).write_text(json.dumps(record or {}, indent=2) + "\n")
    return [folder / name for name in (WEIGHTS_NAME, CONFIG_NAME, RECORD_NAME)]


def adapter_tensors(model: Transformer) -> dict[str, Tensor]:
    """Trained tensors under PEFT's keys; As are views."""
    config, layout = model.config, layout_of(model.config, gguf=False)
    found: dict[str, Tensor] = {}
    for name, layer in lora_layers(model).items():
        rows = sum(b.shape[0] for b in layer.lora_B)
        downs = torch.split(layer.lora_A, layer.lora.rank)
        for piece, a, b in zip(pieces_of(name, rows, config, layout), downs, layer.lora_B, strict=True):
            found[f"{PREFIX}{piece.stored}.lora_A.weight"] = a
            found[f"{PREFIX}{piece.stored}.lora_B.weight"] = b
    stored = _table_names(layout)
    if model.embed_tokens.weight.requires_grad:
        found[f"{PREFIX}{stored['embed_tokens']}.weight"] = model.embed_tokens.weight
        head = head_weight(model)
        found[f"{PREFIX}{stored['lm_head']}.weight"] = head.clone() if model.lm_head is None else head
    if (rows_module := token_rows(model)) is not None:
        found[f"{PREFIX}{stored['embed_tokens']}{ROWS}"] = rows_module.embed_tokens
        if rows_module.lm_head is not None:
            found[f"{PREFIX}{stored['lm_head']}{ROWS}"] = rows_module.lm_head
    return found


def adapter_config(model: Transformer, lora: LoRA, base: str) -> dict[str, Any]:
    """adapter_config.json: the fields that PEFT needs, as its version 0.18 and later read them."""
    layout = layout_of(model.config, gguf=False)
    names = {key: name.rpartition(".")[2] for key, name in _table_names(layout).items()}
    targets = {stored.rpartition(".")[2] for linear in LINEARS for stored in layout["layers.{}." + linear]}
    tied = model.config.tie_word_embeddings
    rows = token_rows(model)
    token_ids: dict[str, list[int]] | None = None
    if rows is not None:
        token_ids = {names["embed_tokens"]: rows.token_ids.tolist()}
        if rows.lm_head is not None:
            token_ids[names["lm_head"]] = rows.token_ids.tolist()
    tables = model.embed_tokens.weight.requires_grad
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "bias": "none",
        "target_modules": sorted(targets),
        "modules_to_save": [names["embed_tokens"], names["lm_head"]] if tables else None,
        "ensure_weight_tying": tables and tied,
        "trainable_token_indices": token_ids,
    }


def _table_names(layout: Layout) -> dict[str, str]:
    """Canonical table -> its name in the checkpoint. In PEFT's view of Qwen2 both lie under model classes alike."""
    return {"embed_tokens": layout["embed_tokens"][0], "lm_head": layout["lm_head"][0]}


def read_adapter(folder: str | Path, config: ModelConfig) -> Adapter:
    """An adapter for a model of this config. Its tensors are checked against the model; nothing in it is executed.

    Raises NotFound, UsageError for kinds of adapter that are not done here, BadFile for damaged ones.
    """
    folder = Path(folder)
    table = read_config(folder)
    lora = _lora_of(folder, table)
    try:
        tensors = load_file(folder / WEIGHTS_NAME)
    except (SafetensorError, OSError) as error:
        raise BadFile(f"{folder / WEIGHTS_NAME} cannot be read: {error}.") from error
    found = Adapter(lora, {}, {}, {}, {}, str(table.get("base_model_name_or_path") or ""))
    record = folder / RECORD_NAME
    found.record = read_json_object(record) if record.exists() else {}
    places = _places(config, lora.rank, table, folder)
    for key, tensor in tensors.items():
        if key not in places:
            raise BadFile(f"{folder} has a tensor {shown(key)} that {config.name} has no place for.")
        kind, module, part, shape = places[key]
        if tensor.shape != shape or not tensor.is_floating_point():
            raise BadFile(
                f"{folder}: {shown(key)} is {list(tensor.shape)} of {tensor.dtype}; {config.name} takes {list(shape)}."
            )
        if kind in ("A", "B"):
            parts = found.downs if kind == "A" else found.ups
            if module not in parts:
                parts[module] = [None] * len(pieces_of(module, 0, config, layout_of(config, gguf=False)))
            parts[module][part] = tensor
        elif kind == "table":
            found.tables[module] = tensor
        else:
            found.rows[module] = (_token_ids(table, config, module, folder), tensor)
    _check_pairs(found, folder)
    return found


def read_config(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json of a folder that holds what `read_adapter` takes; its weights are not read."""
    folder = Path(folder)
    if not (folder / CONFIG_NAME).exists():
        raise NotFound(f"{folder} holds no {CONFIG_NAME}: it is no adapter folder.")
    table = read_json_object(folder / CONFIG_NAME)
    if table.get("peft_type") != "LORA":
        raise UsageError(f"{folder} holds an adapter of kind {shown(table.get('peft_type'))}; only LORA is done.")
    for key, value in NOT_DONE.items():
        if table.get(key, value) not in (value, None):
            raise UsageError(f"{folder} is a LoRA with {key} = {shown(table[key])}, which is not done.")
    if not (folder / WEIGHTS_NAME).exists():
        if (folder / "adapter_model.bin").exists():
            raise BadFile(
                f"{folder} holds its weights as a pickle, which can run code.",
                "Save it again with PEFT: model.save_pretrained(folder, safe_serialization=True).",
            )
        raise NotFound(f"{folder} holds no {WEIGHTS_NAME}.")
    return table


def _lora_of(folder: Path, table: dict[str, Any]) -> LoRA:
    rank, alpha, dropout = (table.get(key) for key in ("r", "lora_alpha", "lora_dropout"))
    numbers = all(isinstance(x, int | float) and not isinstance(x, bool) for x in (alpha, dropout))
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= MAX_RANK or not numbers:
        raise BadFile(f"{folder / CONFIG_NAME} has no usable r, lora_alpha and lora_dropout.")
    assert isinstance(alpha, int | float) and isinstance(dropout, int | float)
    return LoRA(rank, float(alpha), float(dropout), bool(table.get("use_rslora", False)))


_Place = tuple[str, str, int, tuple[int, ...]]  # (A | B | table | rows, canonical module, part, shape)


def _places(config: ModelConfig, rank: int, table: dict[str, Any], folder: Path) -> dict[str, _Place]:
    """Every key that an adapter of this model can have."""
    layout = layout_of(config, gguf=False)
    places: dict[str, _Place] = {}
    shapes = dict(zip(LINEARS, config.layer_linears(), strict=True))
    for layer in range(config.num_layers):
        for name, shape in shapes.items():
            module = f"layers.{layer}.{name}"
            for i, piece in enumerate(pieces_of(module, shape.out_features, config, layout)):
                places[f"{PREFIX}{piece.stored}.lora_A.weight"] = ("A", module, i, (rank, shape.in_features))
                places[f"{PREFIX}{piece.stored}.lora_B.weight"] = ("B", module, i, (piece.stop - piece.start, rank))
    for module, stored in _table_names(layout).items():
        places[f"{PREFIX}{stored}.weight"] = ("table", module, 0, (config.vocab_size, config.hidden_size))
        if table.get("trainable_token_indices"):
            count = len(_token_ids(table, config, module, folder, missing_ok=True))
            places[f"{PREFIX}{stored}{ROWS}"] = ("rows", module, 0, (count, config.hidden_size))
    return places


def _token_ids(
    table: dict[str, Any], config: ModelConfig, module: str, folder: Path, missing_ok: bool = False
) -> list[int]:
    given = table["trainable_token_indices"]
    name = _table_names(layout_of(config, gguf=False))[module].rpartition(".")[2]
    ids = given if isinstance(given, list) else given.get(name, []) if isinstance(given, dict) else None
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < config.vocab_size for i in ids):
        raise BadFile(f"{folder / CONFIG_NAME} has trainable_token_indices that are no ids of {config.name}.")
    if not ids and not missing_ok:
        raise BadFile(f"{folder / CONFIG_NAME} names no trainable tokens for {name}.")
    return ids


def _check_pairs(found: Adapter, folder: Path) -> None:
    for module in found.downs.keys() | found.ups.keys():
        downs, ups = found.downs.get(module, []), found.ups.get(module, [])
        if [a is None for a in downs] != [b is None for b in ups]:
            raise BadFile(f"{folder} has an A without its B, or the reverse, for {module}.")


def load_adapter(model: Transformer, config: ModelConfig, path: str | Path, *, merge: bool | None = None) -> Adapter:
    """Put an adapter onto a loaded network, for inference.

    merge: add it to the weights (no cost per token; in a 16-bit network that rounds). None: merge into plain weights,
    run beside int4 and int8 ones. Raises as `read_adapter` does.
    """
    adapter = read_adapter(path, config)
    attach(model, adapter, torch.float32 if model.dtype == torch.float32 else model.dtype)
    packed = any(layer.base.packed is not None for layer in lora_layers(model).values())
    if not packed if merge is None else merge:
        merge_into(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    return adapter


@torch.no_grad()
def attach(model: Transformer, adapter: Adapter, dtype: torch.dtype) -> None:
    """LoRALinear layers with the adapter's values in `dtype`; tables and rows into the network's own."""
    for module, parts, in_features in adapted_linears(model):
        if module not in adapter.downs:
            continue
        base = model.get_submodule(module)
        assert isinstance(base, Linear)
        layer = LoRALinear(base, parts, adapter.lora, in_features, dtype)
        set_values(layer, adapter.downs[module], adapter.ups[module])
        model.set_submodule(module, layer)
    for name, table in adapter.tables.items():
        if name == "embed_tokens":
            model.embed_tokens.weight.copy_(table)
        elif model.lm_head is not None:
            head_weight(model).copy_(table)
        elif not torch.equal(table, adapter.tables.get("embed_tokens", table.new_empty(0))):
            embedding = model.embed_tokens.weight
            model.lm_head = Linear.from_weight(table.to(dtype=embedding.dtype, device=embedding.device))
    for name, (ids, rows) in adapter.rows.items():
        target = model.embed_tokens.weight if name == "embed_tokens" else head_weight(model)
        target[torch.tensor(ids, device=target.device)] = rows.to(dtype=target.dtype, device=target.device)


@torch.no_grad()
def restore(model: Transformer, adapter: Adapter) -> None:
    """Give a network that is set up for training the values that `write_adapter` saved, but for whole tables.

    Those came with the network (`World.load`), since it may be sharded as it is filled.
    """
    for name, layer in lora_layers(model).items():
        set_values(layer, adapter.downs[name], adapter.ups[name])
    if (rows := token_rows(model)) is not None:
        rows.embed_tokens.copy_(adapter.rows["embed_tokens"][1])
        if rows.lm_head is not None:
            rows.lm_head.copy_(adapter.rows["lm_head"][1])
        rows.write(model)


@torch.no_grad()
def set_values(layer: LoRALinear, downs: list[Tensor | None], ups: list[Tensor | None]) -> None:
    """Fill a layer's adapter; a part that is not adapted adds nothing."""
    for a, given in zip(torch.split(layer.lora_A, layer.lora.rank), downs, strict=True):
        a.zero_() if given is None else a.copy_(given)
    for b, given in zip(layer.lora_B, ups, strict=True):
        b.zero_() if given is None else b.copy_(given)
