"""How a model's authors sample: generation_config.json beside the weights, or the same written into a GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenfit.checkpoint.bounded import read_json_object, shown
from qwenfit.engine.params import SamplingParams
from qwenfit.errors import BadFile, UsageError

# field of SamplingParams -> key of llama.cpp's converter (gguf/constants.py); generation_config.json uses the fields.
GGUF_KEYS = {
    "temperature": "general.sampling.temp",
    "top_p": "general.sampling.top_p",
    "top_k": "general.sampling.top_k",
    "min_p": "general.sampling.min_p",
    "repetition_penalty": "general.sampling.penalty_repeat",
}


def published_sampling(source: str | Path) -> SamplingParams:
    """What the checkpoint folder or .gguf `source` recommends, plain sampling where it says nothing.

    `do_sample: false` is greedy. Lengths are not taken over: an answer ends with the context. Raises BadFile for
    values out of their range.
    """
    path = Path(source)
    if path.suffix.lower() == ".gguf":
        from qwenfit.checkpoint.headers_gguf import read_gguf_header

        metadata = read_gguf_header(path).metadata
        found = {name: metadata.get(key) for name, key in GGUF_KEYS.items()}
    else:
        path = path / "generation_config.json"
        found = _from_table(read_json_object(path) if path.exists() else {})
    try:
        return SamplingParams(**{name: value for name, value in found.items() if value is not None})
    except UsageError as error:
        raise BadFile(f"The sampling that {shown(path)} recommends is impossible: {error.message}") from None


def _from_table(table: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: table.get(name) for name in GGUF_KEYS}
    if found["top_k"] == -1:  # vLLM's way to say all
        found["top_k"] = 0
    if table.get("do_sample") is False:
        found["temperature"] = 0.0
    return found
