"""Blocks of quantized GGUF types to float32 or bfloat16: gguf_blocks.c, in the thread of the caller.

The reference is `gguf.quants.dequantize`; the result is the same bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from qwenfit.kernels import native

TYPES = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"})


def usable() -> bool:
    """Whether a C compiler was found and made them."""
    return isinstance(_load(), ctypes.CDLL)


def dequantise(number: int, blocks: torch.Tensor, block_bytes: int, block_elements: int, out: torch.Tensor) -> None:
    """Fill `out`, float32 or bfloat16, with the values of whole blocks (uint8) of the ggml type `number`.

    Both are contiguous and on the CPU. Several threads may do it at once.
    """
    count = blocks.numel() // block_bytes
    assert blocks.numel() == count * block_bytes and out.numel() == count * block_elements
    assert blocks.is_contiguous() and out.is_contiguous()
    failed = _library().qwenfit_gguf_blocks(number, blocks.data_ptr(), count, out.data_ptr(), native.DTYPES[out.dtype])
    assert not failed, number


def _load() -> ctypes.CDLL | str:
    return native.load(Path(__file__).with_suffix(".c"))


@functools.cache
def _library() -> ctypes.CDLL:
    library = _load()
    assert isinstance(library, ctypes.CDLL), library
    number, long, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.qwenfit_gguf_blocks.argtypes = [number, pointer, long, pointer, number]
    return library
