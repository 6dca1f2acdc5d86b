"""Merge an adapter onto its 16-bit base model: a folder that loads anywhere, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwenfit.checkpoint.bounded import read_json_object, shown
from qwenfit.checkpoint.load import open_weights, with_files
from qwenfit.checkpoint.resolve import resolve_model
from qwenfit.checkpoint.save import new_folder, plain_entries, write_weights
from qwenfit.checkpoint.weights import FLOAT_DTYPES, CanonicalWeights
from qwenfit.config import ModelConfig
from qwenfit.errors import NotFound, UsageError
from qwenfit.tune.fingerprint import other_base
from qwenfit.tune.model_folder import write_model_files
from qwenfit.tune.peft_format import Adapter, read_adapter


@dataclass(frozen=True)
class MergeReport:
    """What was written and onto what; `note` says what the reader should know."""

    target: Path
    base: str
    dtype: str
    adapted: int  # linear layers that the adapter changed
    note: str

    @property
    def text(self) -> str:
        line = f"Merged {self.adapted} adapted layers onto {self.base} in {self.dtype}: {self.target}."
        return line + (f"\n{self.note}" if self.note else "")


def merge(
    adapter: str | Path,
    target: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MergeReport:
    """Write the base model with the adapter added to its weights as a new folder `target`.

    base: None takes the one that the adapter names. dtype: of the result, by default the base's. Sums are float32.
    Raises UsageError for a quantized base or a target that is not empty, NotFound, and BadFile.
    """
    named = base or _named_base(Path(adapter))
    try:
        config = with_files(resolve_model(named), named)
    except NotFound as error:
        if base is not None:
            raise
        raise NotFound(
            f"The base model that {adapter} names, {shown(named)}, is not found from here: {error.message}",
            "Name it: --base MODEL",
        ) from None
    if config.quantization is not None:
        raise UsageError(
            f"{config.name} holds int{config.quantization.bits} weights; an adapter merges onto 16-bit ones.",
            "Name the 16-bit model it was quantized from: --base MODEL",
        )
    dtype = dtype or config.dtype
    if dtype not in FLOAT_DTYPES:
        raise UsageError(f"Weights cannot be written as {dtype!r}.", f"One of {', '.join(FLOAT_DTYPES)}.")
    found = read_adapter(adapter, config)
    tied = config.tie_word_embeddings and "lm_head" in found.tables
    if tied and not torch.equal(found.tables["lm_head"], found.tables["embed_tokens"]):
        raise UsageError(f"The adapter trained a head of its own, and {config.name} ties it to the embedding.")
    weights = open_weights(config)
    weights.check_surplus()
    with new_folder(Path(target)) as folder:
        layout = write_model_files(config, dtype, folder)
        write_weights(folder, plain_entries(config, dtype, _merged_rows(weights, found), layout), progress)
    notes = (other_base(adapter, config), _note(found, config))
    return MergeReport(Path(target), config.name, dtype, len(found.downs), "\n".join(filter(None, notes)))


def _named_base(adapter: Path) -> str:
    file = adapter / "adapter_config.json"
    if not file.exists():
        raise NotFound(f"{adapter} holds no adapter: it has no {file.name}.", "qwenfit merge RUN/adapter TARGET")
    named = read_json_object(file).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise UsageError(f"{adapter} does not name its base model.", "--base MODEL")
    return named


def _merged_rows(weights: CanonicalWeights, adapter: Adapter) -> Callable[[str, int, Tensor], None]:
    """(canonical name, first row, tensor to fill): the base's rows with the adapter's product added in float32."""

    def read(name: str, start: int, out: Tensor) -> None:
        module, _, suffix = name.rpartition(".")
        rows = slice(start, start + out.shape[0])
        if suffix == "weight" and module in adapter.tables:
            out.copy_(adapter.tables[module][rows])
            return
        parameter = weights.parameters[name]
        if suffix == "weight" and module in adapter.downs:
            wide = torch.empty(out.shape, dtype=torch.float32)
            weights.read_rows(parameter, start, wide)
            out.copy_(wide.add_(_delta(adapter, module, [p.stop - p.start for p in parameter.pieces])[rows]))
            return
        weights.read_rows(parameter, start, out)
        if suffix == "weight" and (found := adapter.rows.get(module)) is not None:
            for token, row in zip(*found, strict=True):
                if rows.start <= token < rows.stop:
                    out[token - start] = row

    return read


def _delta(adapter: Adapter, module: str, sizes: list[int]) -> Tensor:
    """float32 [out, in]; a part that is not adapted is zero. `sizes`: rows of the parts, of Qwen-1's or Qwen2's."""
    downs, ups = adapter.downs[module], adapter.ups[module]
    inputs = next(a.shape[1] for a in downs if a is not None)
    products = [
        torch.zeros(size, inputs) if a is None or b is None else b.float() @ a.float()
        for size, a, b in zip(sizes, downs, ups, strict=True)
    ]
    return torch.cat(products) * adapter.lora.scale


def _note(adapter: Adapter, config: ModelConfig) -> str:
    trained_on = adapter.record.get("precision")
    if trained_on in ("int4", "int8"):
        return (
            f"The adapter was trained on {trained_on} weights (Q-LoRA) and is merged onto {config.dtype} ones: answers "
            f"can differ a little from those of the {trained_on} model with the adapter beside it."
        )
    return ""
