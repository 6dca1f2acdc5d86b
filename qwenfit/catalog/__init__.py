"""The data that ships with qwenfit, each row with its source: models, cards, the guide's tables."""

from __future__ import annotations

import csv
import os
from functools import cache

from qwenfit.config import ModelConfig
from qwenfit.errors import NotFound, UsageError, nearest


@cache
def read_csv(name: str) -> tuple[dict[str, str], ...]:
    """The rows of one catalog file, e.g. `models.csv` or `guide/finetune.csv`."""
    # Not importlib.resources: it imports tempfile, zipfile and more, a tenth of a plan's cold start.
    with open(os.path.join(os.path.dirname(__file__), name), newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def model_names() -> list[str]:
    """Every catalog model, mixtures of experts included (they are known, and refused by name)."""
    return [row["model"] for row in read_csv("models.csv")]


def dense_model_names() -> list[str]:
    return [row["model"] for row in read_csv("models.csv") if not row["num_experts"]]


def canonical_name(name: str) -> str:
    """`Qwen/Qwen-7B-Chat` -> `Qwen-7B`: without the owner, and without -Chat, -Instruct or -Base."""
    short = name.strip().removeprefix("Qwen/").removeprefix("qwen/").replace("_", ".")
    for suffix in ("-Chat", "-Instruct", "-Base"):
        if short.lower().endswith(suffix.lower()):
            short = short[: -len(suffix)]
    return short


def hub_name(name: str) -> str:
    """With its owner, and as the Hub spells it: the first 1.8B has an underscore there."""
    return "Qwen/" + name.replace("Qwen-1.8B", "Qwen-1_8B")


def find_model(name: str) -> ModelConfig | None:
    """The catalog's config for a name, or None when the catalog does not have it. Raises for a mixture of experts."""
    wanted = canonical_name(name).lower()
    for row in read_csv("models.csv"):
        if row["model"].lower() == wanted:
            return _from_row(row)
    return None


def get_model(name: str) -> ModelConfig:
    """As `find_model`, but an unknown name raises NotFound with the nearest names."""
    config = find_model(name)
    if config is None:
        name = name[:80]  # a pasted text is no name
        near = nearest(canonical_name(name), dense_model_names())
        ways = [f"Did you mean {', '.join(near)}?"] if near else ["qwenfit models lists what is known."]
        hint = " ".join([*ways, "Others are named by their folder or Hub id, OWNER/NAME."])
        raise NotFound(f"The catalog has no model named {name!r}.", hint)
    return config


def _from_row(row: dict[str, str]) -> ModelConfig:
    if row["num_experts"]:
        raise UsageError(
            f"{row['model']} is a mixture of experts; qwenfit handles the dense Qwen models only.",
            "qwenfit models lists them.",
        )
    architecture = {"Qwen": "qwen1", "Qwen3": "qwen3"}.get(row["family"], "qwen2")
    return ModelConfig(
        name=row["model"],
        architecture=architecture,
        hidden_size=int(row["hidden_size"]),
        num_layers=int(row["num_layers"]),
        num_heads=int(row["num_heads"]),
        num_kv_heads=int(row["num_kv_heads"]),
        head_dim=int(row["head_dim"]),
        intermediate_size=int(row["intermediate_size"]),
        vocab_size=int(row["vocab_size"]),
        tie_word_embeddings=row["tied_embeddings"] == "true",
        qkv_bias=row["qkv_bias"] == "yes",
        qk_norm=row["qk_norm"] == "yes",
        rms_norm_eps=float(row["rms_norm_eps"]),
        rope_theta=float(row["rope_theta"]),
        context_length=int(row["context_length"]),
        training_length=int(row["training_length"]),
        use_dynamic_ntk=row["dynamic_ntk"] == "true",
        use_logn_attn=row["logn_attn"] == "true",
        source=row["source"],
    )
