"""Convert a Qwen-1 checkpoint or a GGUF to a folder that transformers, vLLM, SGLang and llama.cpp read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from qwenfit.checkpoint import tokenizer_export
from qwenfit.checkpoint.bounded import read_json_object
from qwenfit.checkpoint.load import open_weights, with_files
from qwenfit.checkpoint.names import QWEN2, pieces_of
from qwenfit.checkpoint.resolve import resolve_model
from qwenfit.checkpoint.save import (
    Entry,
    hf_config,
    new_folder,
    plain_entries,
    served_length,
    write_json,
    write_weights,
)
from qwenfit.checkpoint.tokenizer_export import TokenizerFiles
from qwenfit.checkpoint.weights import FLOAT_DTYPES, CanonicalWeights
from qwenfit.config import ModelConfig, Quantization
from qwenfit.errors import UsageError

# What generation_config.json of a Qwen-1 release holds that means the same to transformers.
GENERATION_KEYS = ("do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens")


@dataclass(frozen=True)
class ConvertReport:
    """What was written, and plainly where the result equals the original and where it does not."""

    target: Path
    tensors: int
    weight_bytes: int
    equal: tuple[str, ...]
    differs: tuple[str, ...]

    @property
    def text(self) -> str:
        gib = self.weight_bytes / 2**30
        lines = [f"Wrote {self.tensors} tensors, {gib:.2f} GiB ({self.weight_bytes / 1e9:.2f} GB), to {self.target}."]
        lines += [f"Equal: {line}" for line in self.equal]
        lines += [f"Not equal: {line}" for line in self.differs]
        return "\n".join(lines)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str | None = None,
    dequantize: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertReport:
    """Write `source` as a new folder `target` in the Qwen2 (or Qwen3) layout.

    source: a Qwen-1 folder, a .gguf, or the name of a model that was downloaded.
    dtype: float32, float16 or bfloat16 of the plain tensors; by default the checkpoint's. GPTQ and AWQ layers stay
    packed unless `dequantize`. One tensor is in memory at a time; a convert that fails leaves nothing behind.
    Raises UsageError for a non-empty target or a source that has the layout already, NotFound, and BadFile.
    """
    target = Path(target)
    config = resolve_model(source)
    gguf = Path(config.source).suffix.lower() == ".gguf"
    if config.architecture != "qwen1" and not gguf and not (dequantize and config.quantization):
        raise UsageError(f"{config.name} is in the {config.architecture} layout already; there is nothing to convert.")
    config = with_files(config, str(source))
    path = Path(config.source)
    dtype = dtype or config.dtype
    if dtype not in FLOAT_DTYPES:
        raise UsageError(f"Weights cannot be written as {dtype!r}.", f"One of {', '.join(FLOAT_DTYPES)}.")
    weights = open_weights(config)
    weights.check_surplus()
    packed = config.quantization if not dequantize else None
    entries = _packed_entries(weights, dtype) if packed else _dequantized_entries(weights, dtype)
    with new_folder(target) as folder:
        tokenizer = _tokenizer(path, config)
        write_weights(folder, entries, progress)
        table = hf_config(config, dtype)
        if packed:
            table["quantization_config"] = _quantization_table(packed)
        if tokenizer:
            table |= {"eos_token_id": tokenizer.eos_ids[0], "bos_token_id": tokenizer.pad_id}
            write_json(folder / "tokenizer.json", tokenizer.tokenizer)
            write_json(folder / "tokenizer_config.json", tokenizer.settings)
            write_json(folder / "generation_config.json", _generation(path, tokenizer))
        write_json(folder / "config.json", table)
    equal, differs = _comparison(config, gguf, dtype, packed, tokenizer)
    return ConvertReport(target, len(entries), sum(e.nbytes for e in entries), equal, differs)


def _dequantized_entries(weights: CanonicalWeights, dtype: str) -> list[Entry]:
    torch_dtype = FLOAT_DTYPES[dtype]

    @lru_cache(maxsize=1)  # q, k and v are cut one after the other out of one layer
    def whole(name: str) -> torch.Tensor:
        return weights.read(weights.parameters[name], torch_dtype)

    def read_rows(name: str, start: int, out: torch.Tensor) -> None:
        parameter = weights.parameters[name]
        if parameter.quantized:
            out.copy_(whole(name)[start : start + out.shape[0]])
        else:
            weights.read_rows(parameter, start, out)

    return plain_entries(weights.config, dtype, read_rows)


def _packed_entries(weights: CanonicalWeights, dtype: str) -> list[Entry]:
    """Packed layers under Qwen2's names: c_attn's columns cut in three, and biases only where Qwen2 has one."""
    entries = [e for e in _dequantized_entries(weights, dtype) if not _is_packed(weights, e.name)]
    for parameter in weights.parameters.values():
        if not parameter.quantized:
            continue
        pieces = pieces_of(parameter.module, parameter.shape[0], weights.config, QWEN2)
        for piece in pieces:
            (stored,) = [p for p in parameter.pieces if p.start <= piece.start and piece.stop <= p.stop]
            rows = stored.stop - stored.start
            for name in (n for n in parameter.stored if n.startswith(stored.stored + ".")):
                info, part = weights.source.tensors[name], name.rpartition(".")[2]
                first, last = 0, info.shape[-1]
                if part != "g_idx":  # the outputs lie along the last dimension, packed or not
                    first = (piece.start - stored.start) * last // rows
                    last = (piece.stop - stored.start) * last // rows

                def fill(out: torch.Tensor, name: str = name, columns: slice = slice(first, last)) -> None:
                    out.copy_(weights.read_stored(name)[..., columns])

                shape = (*info.shape[:-1], last - first)
                entries.append(Entry(f"{piece.stored}.{part}", info.dtype, shape, fill))
    return entries


def _is_packed(weights: CanonicalWeights, hf_name: str) -> bool:
    return hf_name.endswith("_proj.weight") and weights.config.quantization is not None


def _quantization_table(quantization: Quantization) -> dict[str, Any]:
    if quantization.method == "awq":
        return {
            "quant_method": "awq",
            "bits": quantization.bits,
            "group_size": quantization.group_size,
            "version": "gemm",
            "zero_point": not quantization.sym,
        }
    return {
        "quant_method": "gptq",
        "bits": quantization.bits,
        "group_size": quantization.group_size,
        "desc_act": quantization.desc_act,
        "sym": quantization.sym,
        "checkpoint_format": quantization.checkpoint_format,
    }


def _tokenizer(path: Path, config: ModelConfig) -> TokenizerFiles | None:
    if path.suffix.lower() == ".gguf":
        return tokenizer_export.from_gguf(path, served_length(config))
    if not (path / "qwen.tiktoken").exists():
        return None
    chat = _original_generation(path).get("chat_format", "chatml") == "chatml"
    return tokenizer_export.from_tiktoken(path / "qwen.tiktoken", served_length(config), chat)


def _original_generation(path: Path) -> dict[str, Any]:
    file = path / "generation_config.json"
    return read_json_object(file) if file.exists() else {}


def _generation(path: Path, tokenizer: TokenizerFiles) -> dict[str, Any]:
    original = _original_generation(path) if path.is_dir() else {}
    kept = {key: original[key] for key in GENERATION_KEYS if key in original}
    return {**kept, "eos_token_id": tokenizer.eos_ids, "pad_token_id": tokenizer.pad_id}


def _comparison(
    config: ModelConfig, gguf: bool, dtype: str, packed: Quantization | None, tokenizer: TokenizerFiles | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what equals the original, what does not), one sentence each."""
    length = served_length(config)
    dequantised = gguf or (config.quantization is not None and not packed)
    rounds = dtype != "float32" and (dequantised or dtype != config.dtype)
    exact = "logits, but for the rounding named below," if rounds else "logits,"
    equal = [f"{exact} for prompt and answer together within {length:,} tokens."]
    differs = []
    if config.use_dynamic_ntk or config.use_logn_attn:
        rules = [("dynamic NTK", config.use_dynamic_ntk), ("LogN attention", config.use_logn_attn)]
        names = " and ".join(name for name, used in rules if used)
        differs.append(
            f"beyond {length:,} tokens, where Qwen-1 applies {names} and the Qwen2 architecture cannot; "
            f"max_position_embeddings is {length} so that servers refuse such prompts. qwenfit runs them."
        )
    if dequantised:
        rounded = " and rounded once more" if rounds else ""
        differs.append(f"the layout: quantized weights were dequantised{rounded} to {dtype}.")
    elif rounds:
        differs.append(f"the weights: rounded from {config.dtype} to {dtype}.")
    if tokenizer is None:
        differs.append("the tokenizer: there was no vocabulary beside the weights, so none was written.")
    else:
        equal.append("token ids of any text.")
        differs.append(
            "a special token's text inside a message (<|im_end|>) becomes that token in transformers, and a line break "
            "that opens a message may merge with the one before it; in qwenfit neither happens."
        )
    return tuple(equal), tuple(differs)
