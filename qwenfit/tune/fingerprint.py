"""Which base model an adapter was trained on: what it records of the base's weights, to tell another of equal shapes.

The same weights may come in another form (a GGUF, a 16-bit model beside its GPTQ checkpoint). Then the bytes differ,
and a few values of norms, which no format quantizes, are compared instead.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from pathlib import Path
from typing import Any

import torch

from qwenfit.checkpoint.bounded import read_json_object
from qwenfit.checkpoint.load import open_weights
from qwenfit.checkpoint.weights import CanonicalWeights
from qwenfit.config import ModelConfig
from qwenfit.tune.peft_format import RECORD_NAME

FIELD = "base_weights"  # of the adapter's qwenfit.json, which PEFT leaves alone
VALUES = 16  # of each norm
ROUNDING = 2**-7  # what two 16-bit types may differ by


def fingerprint(config: ModelConfig) -> dict[str, Any]:
    """Of a checkpoint on this machine, from its headers, one row of each tensor and a few values of two norms."""
    weights = open_weights(config)
    form, rows = hashlib.sha256(), hashlib.sha256()
    for name in sorted(stored for parameter in weights.parameters.values() for stored in parameter.stored):
        info = weights.source.tensors[name]
        form.update(f"{name} {info.dtype} {list(info.shape)}\n".encode())
        rows.update(_sample(weights, name))
    return {"form": form.hexdigest()[:32], "rows": rows.hexdigest()[:32], "norms": _norm_values(weights)}


def differs(recorded: Any, config: ModelConfig) -> bool:
    """Whether a checkpoint's weights are not those of which `recorded` is the fingerprint; False if it is none."""
    if not isinstance(recorded, dict) or recorded.keys() != {"form", "rows", "norms"}:
        return False
    here = fingerprint(config)
    if recorded["form"] == here["form"]:
        return bool(recorded["rows"] != here["rows"])
    there = recorded["norms"]
    if not isinstance(there, list) or len(there) != len(here["norms"]):
        return True
    return not all(
        isinstance(a, int | float) and math.isclose(a, b, rel_tol=ROUNDING, abs_tol=1e-6)
        for a, b in zip(there, here["norms"], strict=True)
    )


def other_base(adapter: str | Path, config: ModelConfig) -> str:
    """A warning to show where an adapter folder meets another base than its own; empty where it does not, or is
    without a fingerprint."""
    record = Path(adapter) / RECORD_NAME
    if not record.exists() or not differs(read_json_object(record).get(FIELD), config):
        return ""
    return (
        f"Warning: {adapter} was trained on other weights than those of {config.source}, though of the same shapes: "
        "what it learned may be of no use there."
    )


def _sample(weights: CanonicalWeights, name: str) -> bytes:
    """The middle row of a stored matrix, or the whole of a vector."""
    shape = weights.source.tensors[name].shape
    dtype = torch.float32 if weights.source.is_floating(name) else torch.int32
    start, rows = (0, shape[0]) if len(shape) == 1 else (shape[0] // 2, 1)
    out = torch.empty((rows, *shape[1:]), dtype=dtype)
    weights.source.read_rows(name, start, out)
    return ctypes.string_at(out.data_ptr(), out.nbytes)


def _norm_values(weights: CanonicalWeights) -> list[float]:
    found: list[float] = []
    for name in ("norm.weight", f"layers.{weights.config.num_layers // 2}.input_layernorm.weight"):
        values = torch.empty(weights.parameters[name].shape, dtype=torch.float32)
        weights.read_rows(weights.parameters[name], 0, values)
        found += [float(f"{value:.5g}") for value in values[:VALUES].tolist()]
    return found
