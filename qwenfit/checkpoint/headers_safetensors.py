"""The headers of safetensors checkpoints, read and checked without touching a weight.

Format: 8 bytes little-endian header length, a JSON object `{name: {dtype, shape, data_offsets}}`, then the data,
which the tensors must cover exactly (huggingface/safetensors, README.md, "Format").
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenfit.checkpoint.bounded import MAX_JSON_BYTES, open_regular, parse_json_object, read_json_object, shown
from qwenfit.errors import BadFile, NotFound

INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = MAX_JSON_BYTES  # the format allows 100 MB; a Qwen shard needs under 0.5 MB
MAX_TENSORS = 20_000
MAX_DIMS = 8
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT_HINT = (
    'Convert it where you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('FOLDER').save_pretrained('OUT', safe_serialization=True)\""
)

# the format's code -> (the dtype's usual name, bytes an element)
DTYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "U16": ("uint16", 2),
    "I16": ("int16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U32": ("uint32", 4),
    "I32": ("int32", 4),
    "F32": ("float32", 4),
    "U64": ("uint64", 8),
    "I64": ("int64", 8),
    "F64": ("float64", 8),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies: bytes [begin, end) counted from the header's `data_start`."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class SafetensorsHeader:
    """One file's header; `data_start` is the file offset of the first tensor's first byte."""

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]
    data_start: int


def read_safetensors_header(path: Path | str) -> SafetensorsHeader:
    """Read and check one header. Raises NotFound, or BadFile when the file is not what its header says."""
    path = Path(path)
    what = shown(path)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise BadFile(f"{what} is cut short: its header does not fit into its {size:,} bytes.")
        if length > MAX_HEADER_BYTES:
            raise BadFile(f"{what} announces a header of {length:,} bytes, more than the {MAX_HEADER_BYTES:,} allowed.")
        table = parse_json_object(file.read(length), f"The header of {what}")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadFile(f"The header of {what} has a __metadata__ that is not a table of texts.")
    if len(table) > MAX_TENSORS:
        raise BadFile(f"{what} lists {len(table):,} tensors, more than the {MAX_TENSORS:,} allowed.")
    tensors = {name: _stored_tensor(name, entry, what) for name, entry in table.items()}
    _check_coverage(tensors, size - 8 - length, what)
    return SafetensorsHeader(path, tensors, metadata, 8 + length)


def _stored_tensor(name: str, entry: Any, what: str) -> StoredTensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise BadFile(f"{what} describes tensor {shown(name)} by something else than dtype, shape and data_offsets.")
    return stored_tensor(name, entry["dtype"], entry["shape"], entry["data_offsets"], what)


def stored_tensor(name: str, dtype: Any, shape: Any, offsets: Any, what: str) -> StoredTensor:
    """One tensor's entry, checked: a known dtype, whole non-negative sizes, and as many bytes as the shape needs."""
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise BadFile(f"{what} stores tensor {shown(name)} in the unknown dtype {shown(dtype)}.")
    if not _whole_numbers(shape) or len(shape) > MAX_DIMS:
        raise BadFile(f"{what} gives tensor {shown(name)} a shape that is not a short list of sizes.")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise BadFile(f"{what} gives tensor {shown(name)} data_offsets that are not two byte positions.")
    canonical, item_bytes = DTYPES[dtype]
    begin, end = offsets
    needed = math.prod(shape) * item_bytes
    if needed != end - begin:
        raise BadFile(f"{what} gives tensor {shown(name)} {end - begin:,} bytes where its shape needs {needed:,}.")
    return StoredTensor(canonical, tuple(shape), begin, end)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list | tuple) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_coverage(tensors: dict[str, StoredTensor], data_bytes: int, what: str) -> None:
    """The tensors, in order, must fill the data exactly: no gap, no overlap, nothing outside."""
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            fault = "overlaps the one before it" if tensor.begin < position else "leaves a gap before it"
            raise BadFile(f"{what} places tensor {shown(name)} so that it {fault}.")
        position = tensor.end
    if position != data_bytes:
        fault = "is cut short" if position > data_bytes else "has bytes that belong to no tensor"
        raise BadFile(f"{what} {fault}: its tensors take {position:,} bytes and {data_bytes:,} follow the header.")


def read_checkpoint_headers(folder: Path | str) -> dict[str, SafetensorsHeader]:
    """The header of every safetensors file that makes up the checkpoint in a folder, by file name.

    An index names the shards; without one it is model.safetensors or the only *.safetensors file. Empty when the
    folder has no weights at all. Raises BadFile for pickled weights only, or when files and index disagree.
    """
    folder = Path(folder)
    if (folder / INDEX_NAME).exists():
        return read_index(folder)
    try:
        names = sorted(entry.name for entry in os.scandir(folder))
    except OSError as error:
        raise NotFound(f"The folder {shown(folder)} cannot be listed ({error.strerror}).") from None
    files = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter_")]
    if "model.safetensors" in files:
        files = ["model.safetensors"]
    if len(files) > 1:
        raise BadFile(f"{shown(folder)} has {len(files)} safetensors files and no {INDEX_NAME} to say which belong.")
    if files:
        return {files[0]: read_safetensors_header(_inside(folder, files[0]))}
    if pickled := [name for name in names if name.endswith(PICKLE_SUFFIXES)]:
        raise refuse_pickle(folder / pickled[0])
    return {}


def refuse_pickle(path: Path) -> BadFile:
    """The error for weights that only unpickling, and so running foreign code, could read."""
    return BadFile(f"{shown(path)} is a pickle, which can run code when opened, so qwenfit does not.", CONVERT_HINT)


def read_index(folder: Path | str) -> dict[str, SafetensorsHeader]:
    """The headers of a sharded checkpoint, by shard; every tensor is in the shard that the index names, and once."""
    folder = Path(folder)
    what = shown(folder / INDEX_NAME)
    weight_map = read_json_object(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadFile(f"{what} has no weight_map.")
    if len(weight_map) > MAX_TENSORS:
        raise BadFile(f"{what} lists {len(weight_map):,} tensors, more than the {MAX_TENSORS:,} allowed.")
    for shard in weight_map.values():
        if not _plain_file_name(shard):
            raise BadFile(f"{what} names the shard {shown(shard)}, which is not a file name inside the folder.")
    headers: dict[str, SafetensorsHeader] = {}
    found = 0
    for shard in sorted(set(weight_map.values())):
        header = read_safetensors_header(_inside(folder, shard))
        for name in header.tensors:
            if weight_map.get(name) != shard:
                fault = "which the index places elsewhere" if name in weight_map else "which the index does not list"
                raise BadFile(f"{shown(header.path)} holds tensor {shown(name)}, {fault}.")
        found += len(header.tensors)
        headers[shard] = header
    if found != len(weight_map):
        lost = next(name for name, shard in weight_map.items() if name not in headers[shard].tensors)
        raise BadFile(f"{what} places tensor {shown(lost)} in {shown(weight_map[lost])}, which does not hold it.")
    return headers


def _plain_file_name(name: Any) -> bool:
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and not any(c in "/\\:" or ord(c) < 32 for c in name)
        and not name.startswith(".")
        and len(name) < 256
    )


def _inside(folder: Path, name: str) -> Path:
    """The file of a checkpoint folder; a link may lead only into that folder or its Hugging Face cache's blobs."""
    path = folder / name
    try:
        target, home = path.resolve(), folder.resolve()
    except (OSError, RuntimeError):  # RuntimeError: a circle of links
        raise BadFile(f"{shown(path)} is a link that leads nowhere.") from None
    if not target.exists():
        raise NotFound(f"{shown(path)} is missing, so the checkpoint is incomplete.", "Download the folder again.")
    allowed = [home]
    if home.parent.name == "snapshots":  # models--owner--name/snapshots/REVISION/file -> ../../blobs/HASH
        allowed.append(home.parent.parent / "blobs")
    if target.parent not in allowed:
        raise BadFile(f"{shown(path)} is a link that leads out of the checkpoint's folder.")
    return path
