"""GGUF headers, versions 2 and 3: metadata and tensor table, read in a bounded way without touching a weight.

Layout: magic, version, two counts, key-value pairs, tensor infos, padding, data (ggml-org/ggml, docs/gguf.md).
The long arrays of the tokenizer are walked over unless asked for.
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qwenfit.checkpoint.bounded import open_regular, shown
from qwenfit.errors import BadFile

MAX_KEYS = 10_000
MAX_TENSORS = 20_000
MAX_NAME_BYTES = 1024
MAX_STRING_BYTES = 2**20  # one metadata text; the longest in use, a chat template, has some 10 KB
MAX_ARRAY_ELEMENTS = 640_000  # over all arrays; the largest in use are four of 152,064 (texts, scores, types, merges)
MAX_KEPT_BYTES = 16 * 2**20  # texts kept in memory
MAX_ALIGNMENT = 64 * 1024
WINDOW_BYTES = 2**20

# ggml type -> (name, elements of a block, bytes of a block): ggml-org/llama.cpp, gguf-py/gguf/constants.py.
# Q8_1 is left out: it exists only while computing, never in a file.
GGML_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}

_SCALARS = {
    kind: struct.Struct("<" + code)
    for kind, code in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
_STRING, _ARRAY = 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]


@dataclass(frozen=True)
class SkippedArray:
    """Stands for an array that was walked over: its GGUF value type and its number of elements."""

    value_type: int
    count: int


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One stored tensor. `shape` is [out, in] as in PyTorch; `offset` counts from the start of the file."""

    name: str
    ggml_type: int
    type_name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """Everything before the weights; arrays in `metadata` are lists, or SkippedArray when not asked for."""

    path: Path
    version: int
    metadata: dict[str, Any]
    tensors: list[GGUFTensor]
    data_start: int


def read_gguf_header(path: Path | str, arrays: bool = False) -> GGUFHeader:
    """Read and check a header; `arrays` also keeps the arrays (the tokenizer's). Raises NotFound or BadFile."""
    path = Path(path)
    with open_regular(path) as file:
        reader = _Reader(file, os.fstat(file.fileno()).st_size, shown(path), arrays)
        version = _read_version(reader)
        num_tensors, num_keys = reader.scalar(_U64), reader.scalar(_U64)
        for count, most, kind in ((num_tensors, MAX_TENSORS, "tensors"), (num_keys, MAX_KEYS, "metadata keys")):
            if count > most:
                raise reader.bad(f"announces {count:,} {kind}, more than the {most:,} allowed")
        metadata = _read_metadata(reader, num_keys)
        infos = [_read_tensor_info(reader) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise reader.bad("has a general.alignment that is not a power of two up to 65,536")
    data_start = math.ceil(reader.position / alignment) * alignment
    tensors = [_place(reader, info, data_start, alignment) for info in infos]
    _check_overlaps(reader, tensors)
    return GGUFHeader(path, version, metadata, tensors, data_start)


class _Reader:
    """Little-endian values through a sliding window; each read is checked against the file's size first."""

    def __init__(self, file: BinaryIO, size: int, what: str, arrays: bool) -> None:
        self.file, self.size, self.what, self.arrays = file, size, what, arrays
        self.window, self.start, self.at = b"", 0, 0  # `at` counts from the window's start and may lie beyond it
        self.elements_left, self.bytes_left = MAX_ARRAY_ELEMENTS, MAX_KEPT_BYTES

    @property
    def position(self) -> int:
        return self.start + self.at

    def bad(self, fault: str) -> BadFile:
        return BadFile(f"{self.what} {fault}.")

    def cut_short(self) -> BadFile:
        return self.bad(f"is cut short or lies about a length: its header leads beyond its {self.size:,} bytes")

    def fill(self, count: int) -> None:
        """Slide the window so that the next `count` bytes are in it."""
        self.start, self.at = self.position, 0
        if self.start + count > self.size:
            raise self.cut_short()
        self.file.seek(self.start)
        self.window = self.file.read(max(count, WINDOW_BYTES))
        if len(self.window) < count:
            raise self.cut_short()

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.window):
            self.fill(count)
        self.at += count
        return self.window[self.at - count : self.at]

    def scalar(self, kind: struct.Struct) -> Any:
        return kind.unpack(self.take(kind.size))[0]

    def text(self, limit: int) -> str:
        length = self.scalar(_U64)
        if length > limit:
            raise self.bad(f"announces a text of {length:,} bytes, more than the {limit:,} allowed")
        self.bytes_left -= length
        if self.bytes_left < 0:
            raise self.bad(f"holds more than {MAX_KEPT_BYTES:,} bytes of metadata texts")
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.bad("has a text in its header that is not UTF-8") from None

    def skip(self, count: int) -> None:
        self.at += count
        if self.position > self.size:
            raise self.cut_short()

    def skip_texts(self, count: int) -> None:
        """Walk over `count` texts: one tight loop, since the vocabulary has 300,000 of them."""
        unpack, left = _U64.unpack_from, iter(range(count))
        while True:
            window, at = self.window, self.at
            try:
                for _ in left:
                    at += 8 + unpack(window, at)[0]
            except (struct.error, OverflowError):  # the window ends before this text, which `left` has counted already
                self.at = at
                length = self.scalar(_U64)
                self.at += length
            else:
                self.at = at
                self.skip(0)
                return


def _read_version(reader: _Reader) -> int:
    if reader.size < 24 or reader.take(4) != b"GGUF":
        raise reader.bad("is not a GGUF file")
    version: int = reader.scalar(_U32)
    if version & 0xFFFF == 0:
        raise BadFile(f"{reader.what} is a big-endian GGUF.", "Download the little-endian file of the same model.")
    if version not in (2, 3):
        raise BadFile(
            f"{reader.what} is GGUF version {version}; qwenfit reads versions 2 and 3.",
            "Convert the model again with a current llama.cpp.",
        )
    return version


def _read_metadata(reader: _Reader, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(count):
        key = reader.text(MAX_NAME_BYTES)
        if key in metadata:
            raise reader.bad(f"has the metadata key {shown(key)} twice")
        metadata[key] = _read_value(reader, reader.scalar(_U32))
    return metadata


def _read_value(reader: _Reader, kind: int) -> Any:
    if kind in _SCALARS:
        return reader.scalar(_SCALARS[kind])
    if kind == _STRING:
        return reader.text(MAX_STRING_BYTES)
    if kind == _ARRAY:
        return _read_array(reader)
    raise reader.bad(f"has a metadata value of the unknown type {kind}")


def _read_array(reader: _Reader) -> list[Any] | SkippedArray:
    kind, count = reader.scalar(_U32), reader.scalar(_U64)
    if kind == _ARRAY:  # allowed by the format, written by nobody
        raise reader.bad("has an array of arrays in its metadata")
    if kind != _STRING and kind not in _SCALARS:
        raise reader.bad(f"has a metadata array of the unknown type {kind}")
    reader.elements_left -= count
    if reader.elements_left < 0:
        raise reader.bad(f"announces metadata arrays of more than {MAX_ARRAY_ELEMENTS:,} elements")
    if reader.arrays:
        if kind == _STRING:
            return [reader.text(MAX_STRING_BYTES) for _ in range(count)]
        scalar = _SCALARS[kind]
        return [value for (value,) in scalar.iter_unpack(reader.take(count * scalar.size))]
    if kind == _STRING:
        reader.skip_texts(count)
    else:
        reader.skip(count * _SCALARS[kind].size)
    return SkippedArray(kind, count)


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    name: str
    ggml_type: int
    dims: tuple[int, ...]  # as stored: the contiguous dimension first
    offset: int  # from the start of the data


def _read_tensor_info(reader: _Reader) -> _TensorInfo:
    name = reader.text(MAX_NAME_BYTES)
    num_dims = reader.scalar(_U32)
    if not 1 <= num_dims <= 4:
        raise reader.bad(f"gives tensor {shown(name)} {num_dims} dimensions")
    dims = struct.unpack(f"<{num_dims}Q", reader.take(8 * num_dims))
    return _TensorInfo(name, reader.scalar(_U32), dims, reader.scalar(_U64))


def _place(reader: _Reader, info: _TensorInfo, data_start: int, alignment: int) -> GGUFTensor:
    """The tensor's absolute place, checked: known type, whole blocks, aligned, inside the file."""
    name = shown(info.name)
    if info.ggml_type not in GGML_TYPES:
        raise reader.bad(f"stores tensor {name} in the unknown type {info.ggml_type}")
    type_name, block, block_bytes = GGML_TYPES[info.ggml_type]
    if not all(info.dims) or info.dims[0] % block:
        raise reader.bad(f"gives tensor {name} rows of {info.dims[0]:,} that are not whole {type_name} blocks")
    nbytes = math.prod(info.dims) // block * block_bytes
    if info.offset % alignment:
        raise reader.bad(f"places tensor {name} off its alignment of {alignment:,} bytes")
    offset = data_start + info.offset
    if offset + nbytes > reader.size:
        raise reader.bad(f"is cut short: tensor {name} ends at byte {offset + nbytes:,} of {reader.size:,}")
    return GGUFTensor(info.name, info.ggml_type, type_name, info.dims[::-1], offset, nbytes)


def _check_overlaps(reader: _Reader, tensors: list[GGUFTensor]) -> None:
    end, names = 0, set()
    for tensor in sorted(tensors, key=lambda t: t.offset):
        if tensor.offset < end:
            raise reader.bad(f"places tensor {shown(tensor.name)} over the one before it")
        if tensor.name in names:
            raise reader.bad(f"lists tensor {shown(tensor.name)} twice")
        end = tensor.offset + tensor.nbytes
        names.add(tensor.name)
