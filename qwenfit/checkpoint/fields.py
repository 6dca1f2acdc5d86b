"""Checked access to the fields of a config: each missing, mistyped or absurd value becomes one sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qwenfit.checkpoint.bounded import shown
from qwenfit.config import ModelConfig
from qwenfit.errors import BadFile

# The largest value taken of each size; the largest dense Qwen is far below all of them.
MAX_HIDDEN = 1_000_000
MAX_INNER = 10_000_000
MAX_LAYERS = 1_000
MAX_HEADS = 100_000
MAX_HEAD_DIM = 65_536
MAX_VOCAB = 10_000_000
MAX_CONTEXT = 1_000_000_000

_REQUIRED: Any = object()


class Fields:
    """A table of a config under its file's name. A key may have several spellings: the first one present counts."""

    def __init__(self, table: Mapping[str, Any], what: str) -> None:
        self.table, self.what = table, what

    def bad(self, fault: str) -> BadFile:
        return BadFile(f"{self.what} {fault}.")

    def get(self, *keys: str, default: Any = _REQUIRED) -> tuple[str, Any]:
        """(the spelling found, its value); null counts as absent."""
        for key in keys:
            if self.table.get(key) is not None:
                return key, self.table[key]
        if default is _REQUIRED:
            raise self.bad(f"has no {keys[0]}")
        return keys[0], default

    def integer(self, *keys: str, most: int, least: int = 1, default: Any = _REQUIRED) -> int:
        key, value = self.get(*keys, default=default)
        if type(value) is not int:  # True is an int to isinstance
            raise self.bad(f"has a {key} that is not an integer: {shown(value)}")
        if not least <= value <= most:
            size = f"of {value:,}" if abs(value) < 10**18 else "of many digits"
            raise self.bad(f"has a {key} {size}, which is not between {least:,} and {most:,}")
        return value

    def number(self, *keys: str, least: float, most: float, default: Any = _REQUIRED) -> float:
        key, value = self.get(*keys, default=default)
        if type(value) not in (int, float):
            raise self.bad(f"has a {key} that is not a number: {shown(value)}")
        if not least <= value <= most or not math.isfinite(value):
            raise self.bad(f"has a {key} of {shown(value)}, which is not between {least:g} and {most:g}")
        return float(value)

    def flag(self, *keys: str, default: Any = _REQUIRED) -> bool:
        key, value = self.get(*keys, default=default)
        if type(value) is not bool:
            raise self.bad(f"has a {key} that is neither true nor false: {shown(value)}")
        return value

    def word(self, *keys: str, default: Any = _REQUIRED) -> str:
        key, value = self.get(*keys, default=default)
        if not isinstance(value, str):
            raise self.bad(f"has a {key} that is not a text: {shown(value)}")
        return value

    def nested(self, key: str) -> Fields | None:
        """The object under a key, or None when the key is absent or null."""
        _, value = self.get(key, default=None)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.bad(f"has a {key} that is not an object: {shown(value)}")
        return Fields(value, f"The {key} in {self.what[0].lower()}{self.what[1:]}")


def check_sizes(config: ModelConfig, fields: Fields) -> ModelConfig:
    """The sizes that must agree with one another, checked; returns the config."""
    if config.num_heads % config.num_kv_heads:
        raise fields.bad(f"has {config.num_heads} attention heads, no multiple of its {config.num_kv_heads} KV heads")
    if config.head_dim % 2:
        raise fields.bad(f"has an odd head size of {config.head_dim}, which rotary embedding cannot split into halves")
    if config.context_length > MAX_CONTEXT:
        raise fields.bad(f"asks for a context of {config.context_length:,} tokens, beyond {MAX_CONTEXT:,}")
    if config.q_size > MAX_HIDDEN:
        raise fields.bad(f"has {config.num_heads} heads of {config.head_dim}, wider than {MAX_HIDDEN:,} together")
    return config
