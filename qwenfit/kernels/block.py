"""The C kernels of block.c: the small operations of a block on the CPU, in one call each.

`usable` says for which activations they run; everything else takes the PyTorch version of the operation.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch

from qwenfit.kernels import native

CACHE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
MAX_HEAD_DIM = 256  # of attention, as block.c says

_SOURCE = Path(__file__).with_name("block.c")


class Cache(ctypes.Structure):
    """The struct Cache of block.c: one layer's keys and values. The tensors must outlive it."""

    _fields_ = [
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("key_affine", ctypes.c_void_p),
        ("value_affine", ctypes.c_void_p),
        ("kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("dtype", ctypes.c_int),
    ]


def usable(x: torch.Tensor) -> bool:
    """float32 or bfloat16 on the CPU, without gradients, where a C compiler was found."""
    return x.dtype in native.DTYPES and x.device.type == "cpu" and not torch.is_grad_enabled() and _available()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., width], weight [width], of one dtype."""
    x, width = x.contiguous(), x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype)
    rows = x.numel() // width
    _library().qwenfit_rms_norm(
        x.data_ptr(), weight.data_ptr(), y.data_ptr(), rows, width, eps, native.DTYPES[x.dtype], torch.get_num_threads()
    )
    return y


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [rows, 2 * width] -> [rows, width]."""
    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = gate_up.new_empty(rows, width)
    _library().qwenfit_silu_mul(
        gate_up.data_ptr(), y.data_ptr(), rows, width, native.DTYPES[y.dtype], torch.get_num_threads()
    )
    return y


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x [tokens, heads, head_dim], each token's heads contiguous; cos, sin float32 [tokens, 1, head_dim]."""
    y = torch.empty(x.shape, dtype=x.dtype)
    _library().qwenfit_rotate(
        x.data_ptr(),
        _token_stride(x),
        cos.data_ptr(),
        sin.data_ptr(),
        y.data_ptr(),
        *x.shape,
        native.DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    return y


def write_kv(cache: Cache, k: torch.Tensor, v: torch.Tensor, slots: torch.Tensor) -> None:
    """k and v [tokens, kv_heads, head_dim], each token's heads contiguous; slots int64 [tokens]."""
    _library().qwenfit_write_kv(
        cache,
        k.data_ptr(),
        _token_stride(k),
        v.data_ptr(),
        _token_stride(v),
        slots.data_ptr(),
        k.shape[0],
        native.DTYPES[k.dtype],
        torch.get_num_threads(),
    )


def decode_attention(
    cache: Cache,
    q: torch.Tensor,
    out: torch.Tensor,
    rows: torch.Tensor,
    contexts: torch.Tensor,
    tables: torch.Tensor,
    scale: float,
) -> None:
    """One query token for each sequence: q[rows] [tokens, heads, head_dim] -> out[rows] [tokens, heads * head_dim].

    rows int64 and contexts int32 [sequences]; tables int32 [sequences, max_blocks].
    """
    failed = _library().qwenfit_decode_attention(
        cache,
        q.data_ptr(),
        _token_stride(q),
        out.data_ptr(),
        q.shape[1],
        rows.data_ptr(),
        contexts.data_ptr(),
        tables.data_ptr(),
        tables.stride(0),
        len(rows),
        scale,
        native.DTYPES[q.dtype],
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("out of memory in attention")


def _token_stride(x: torch.Tensor) -> int:
    """Between the tokens of x [tokens, heads, head_dim], whose heads must lie side by side."""
    token, head, one = x.stride()
    assert one == 1 and (head == x.shape[2] or x.shape[1] == 1)
    return token


@functools.cache
def _available() -> bool:
    return isinstance(native.load(_SOURCE), ctypes.CDLL)


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load(_SOURCE)
    assert isinstance(library, ctypes.CDLL), library
    number, long, pointer, cache = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.POINTER(Cache)
    signatures: dict[str, list[Any]] = {
        "rms_norm": [pointer, pointer, pointer, long, long, ctypes.c_float, number, number],
        "silu_mul": [pointer, pointer, long, long, number, number],
        "rotate": [pointer, long, pointer, pointer, pointer, long, long, long, number, number],
        "write_kv": [cache, pointer, long, pointer, long, pointer, long, number, number],
        "decode_attention": [
            *[cache, pointer, long, pointer, long, pointer, pointer, pointer],
            *[long, long, ctypes.c_float, number, number],
        ],
    }
    for name, types in signatures.items():
        function = library[f"qwenfit_{name}"]
        function.argtypes = types
        function.restype = number if name == "decode_attention" else None
        setattr(library, f"qwenfit_{name}", function)
    return library
