"""Write a checkpoint: safetensors shards in the Hugging Face layout, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwenfit.checkpoint.headers_safetensors import DTYPES, INDEX_NAME
from qwenfit.checkpoint.names import QWEN2, Layout, canonical_parameters, pieces_of
from qwenfit.checkpoint.weights import PLAIN_DTYPES
from qwenfit.config import DTYPE_BYTES, ModelConfig
from qwenfit.errors import QwenfitError, UsageError

MAX_SHARD_BYTES = 5 * 10**9  # what transformers writes by default
_CODES = {name: code for code, (name, _) in DTYPES.items()}  # float16 -> F16

ReadRows = Callable[[str, int, torch.Tensor], None]  # (canonical name, first row, tensor to fill)


@dataclass(frozen=True)
class Entry:
    """One tensor to write. `fill` puts its values into a CPU tensor of its shape and dtype."""

    name: str
    dtype: str  # of PLAIN_DTYPES
    shape: tuple[int, ...]
    fill: Callable[[torch.Tensor], None]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


def plain_entries(config: ModelConfig, dtype: str, read_rows: ReadRows, layout: Layout = QWEN2) -> list[Entry]:
    """The tensors of a Qwen2 or Qwen3 folder, cut out of the canonical parameters that `read_rows` reads."""
    entries = []
    for name, shape in canonical_parameters(config).items():
        module, _, suffix = name.rpartition(".")
        for piece in pieces_of(module, shape[0], config, layout):

            def fill(out: torch.Tensor, name: str = name, start: int = piece.start) -> None:
                read_rows(name, start, out)

            stored = f"{piece.stored}.{suffix}"
            entries.append(Entry(stored, dtype, (piece.stop - piece.start, *shape[1:]), fill))
    return entries


def save_checkpoint(
    target: Path, config: ModelConfig, read_rows: ReadRows, dtype: str = "bfloat16", files: dict[str, Any] | None = None
) -> None:
    """Write a whole model folder: config.json, weights, and `files` (name -> JSON value) beside them.

    `read_rows(name, start, out)` fills `out` from a canonical parameter's rows. The folder appears only when it is
    complete. Raises UsageError when `target` exists and is not empty, QwenfitError when it cannot be written.
    """
    with new_folder(target) as folder:
        write_weights(folder, plain_entries(config, dtype, read_rows))
        write_json(folder / "config.json", hf_config(config, dtype))
        for name, value in (files or {}).items():
            write_json(folder / name, value)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill beside `target`, renamed to it on success and removed on any failure."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists and is not empty.", "Name a new folder, or remove that one.")
    aside = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        aside.mkdir(parents=True)
        yield aside
        if target.exists():
            target.rmdir()
        aside.rename(target)
    except OSError as error:
        raise QwenfitError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_weights(folder: Path, entries: list[Entry], progress: Callable[[int, int], None] | None = None) -> None:
    """model.safetensors, or shards of at most 5 GB with their index. `progress(bytes done, bytes in all)`."""
    total = sum(entry.nbytes for entry in entries)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise QwenfitError(f"The converted weights take {total:,} bytes and the disk has {free:,} free.")
    shards = _shards(entries)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    done = 0
    for name, shard in zip(names, shards, strict=True):
        for entry in _write_shard(folder / name, shard):
            done += entry.nbytes
            if progress is not None:
                progress(done, total)
    if len(shards) > 1:
        weight_map = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
        write_json(folder / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(entries: list[Entry]) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    room = MAX_SHARD_BYTES
    for entry in entries:
        if entry.nbytes > room and shards[-1]:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(entry)
        room -= entry.nbytes
    return shards


def _write_shard(path: Path, entries: list[Entry]) -> Iterator[Entry]:
    """Write one safetensors file (huggingface/safetensors, README.md, "Format"), yielding what has been written."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        end = position + entry.nbytes
        table[entry.name] = {"dtype": _CODES[entry.dtype], "shape": entry.shape, "data_offsets": [position, end]}
        position = end
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for entry in entries:
            tensor = torch.empty(entry.shape, dtype=PLAIN_DTYPES[entry.dtype])
            entry.fill(tensor)
            file.write(tensor.view(torch.uint8).numpy().data)
            yield entry
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def hf_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """config.json of Qwen2ForCausalLM or Qwen3ForCausalLM, in the keys published before transformers 5, which all read.

    Qwen-1 becomes a Qwen2 without dynamic NTK and LogN, so its length ends at the training length.
    """
    qwen3 = config.architecture == "qwen3"
    table: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM" if qwen3 else "Qwen2ForCausalLM"],
        "model_type": "qwen3" if qwen3 else "qwen2",
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": served_length(config),
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }
    if qwen3:
        table |= {"attention_bias": False, "head_dim": config.head_dim}
    if config.yarn is not None:
        yarn = config.yarn
        table["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_max_position_embeddings,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
        } | ({} if yarn.attention_factor is None else {"attention_factor": yarn.attention_factor})
    return table


def served_length(config: ModelConfig) -> int:
    """Tokens up to which the Qwen2 architecture computes what this model does."""
    if config.use_dynamic_ntk or config.use_logn_attn:
        return min(config.training_length, config.context_length)
    return config.context_length
