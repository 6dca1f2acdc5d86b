"""Small checkpoint files written by hand, byte by byte, and what every refusal must look like."""

import json
import math
import re
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from qwenfit.errors import BadFile, NotFound, QwenfitError, UsageError

EXIT_CODES = {UsageError: 2, NotFound: 4, BadFile: 5}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I32": 4, "U8": 1}
MEMORY_LIMIT = 64 * 2**20


def refused(kind: type[QwenfitError], word: str, call: Callable[[], object]) -> QwenfitError:
    """The call must raise exactly this class, with one sentence that contains `word`."""
    with pytest.raises(QwenfitError) as caught:
        call()
    error = caught.value
    assert type(error) is kind and error.exit_code == EXIT_CODES[kind], error.message
    assert word in error.message
    assert_one_sentence(error)
    return error


def assert_one_sentence(error: QwenfitError) -> None:
    assert "\n" not in error.message and "Traceback" not in error.message and len(error.message) < 1000
    outside_quotes = re.sub(r"'[^']*'|\"[^\"]*\"", "X", error.message)
    assert re.findall(r"[.!?](?=\s|$)", outside_quotes) == ["."] and outside_quotes.endswith("."), error.message


def only_expected(call: Callable[[], object]) -> None:
    """Whatever the input, the call returns or raises a QwenfitError, within the memory limit."""
    tracemalloc.start()
    try:
        call()
    except QwenfitError as error:
        assert_one_sentence(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY_LIMIT


def safetensors_bytes(shapes: dict[str, tuple[int, ...]], dtype: str = "F32") -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * ITEM_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return with_header(table, position)


def with_header(table: Any, data_bytes: int) -> bytes:
    header = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(header)) + header + bytes(data_bytes)


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def gguf_value(value: Any) -> bytes:
    """A metadata value with its type: u32 for int, f32 for float, string, bool, or an array of one of these."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    items = [gguf_value(item) for item in value]
    return struct.pack("<I", 9) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(item[4:] for item in items)


def gguf_bytes(metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]], **lies: Any) -> bytes:
    """A whole GGUF file, its weights zero."""
    head, data_bytes = gguf_head(metadata, tensors, **lies)
    return head + bytes(data_bytes)


def gguf_head(
    metadata: dict[str, Any],
    tensors: dict[str, tuple[int, ...]],
    *,
    version: int = 3,
    ggml_type: int = 0,
    bytes_per_row: Callable[[int], int] = lambda columns: 4 * columns,
    alignment: int = 32,
    offsets: dict[str, int] | None = None,
    counts: tuple[int, int] | None = None,
) -> tuple[bytes, int]:
    """(everything before the weights, bytes of the weights); `tensors` maps names to [out, in] shapes.

    `offsets` and `counts` tell lies.
    """
    num_tensors, num_keys = counts or (len(tensors), len(metadata))
    head = struct.pack("<4sIQQ", b"GGUF", version, num_tensors, num_keys)
    head += b"".join(text(key) + gguf_value(value) for key, value in metadata.items())
    position = 0
    for name, shape in tensors.items():
        place = (offsets or {}).get(name, position)
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], ggml_type, place)
        position += math.ceil(math.prod(shape[:-1]) * bytes_per_row(shape[-1]) / alignment) * alignment
    return head + bytes(-len(head) % alignment), position


QWEN2_GGUF = {
    "general.architecture": "qwen2",
    "qwen2.block_count": 1,
    "qwen2.context_length": 512,
    "qwen2.embedding_length": 64,
    "qwen2.feed_forward_length": 128,
    "qwen2.attention.head_count": 4,
    "qwen2.attention.head_count_kv": 2,
    "qwen2.rope.freq_base": 1000000.0,
    "qwen2.attention.layer_norm_rms_epsilon": 1e-6,
    "tokenizer.ggml.tokens": ["a", "b", "ä"],
    "tokenizer.ggml.token_type": [1, 1, 3],
}
QWEN2_GGUF_TENSORS = {
    "token_embd.weight": (96, 64),
    "blk.0.attn_norm.weight": (64,),
    "blk.0.ffn_norm.weight": (64,),
    "blk.0.attn_q.weight": (64, 64),
    "blk.0.attn_q.bias": (64,),
    "blk.0.attn_k.weight": (32, 64),
    "blk.0.attn_k.bias": (32,),
    "blk.0.attn_v.weight": (32, 64),
    "blk.0.attn_v.bias": (32,),
    "blk.0.attn_output.weight": (64, 64),
    "blk.0.ffn_gate.weight": (128, 64),
    "blk.0.ffn_up.weight": (128, 64),
    "blk.0.ffn_down.weight": (64, 128),
    "output_norm.weight": (64,),
}
