"""Round weights to 8 or 4 bits straight into the layout of the CPU kernels: round.c, rows at a time.

The reference is `quantize_rtn` followed by `pack`, with `gguf.quants.dequantize` before them for rows in GGUF blocks;
the result is the same bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from qwenfit.kernels import native, pages
from qwenfit.kernels.choice import choose_kernel
from qwenfit.kernels.packed import PackedWeight

_SOURCE = Path(__file__).with_name("round.c")


def usable(bits: int, dtype: torch.dtype, device: torch.device, in_features: int, group_size: int) -> bool:
    """Whether `pack` would choose this layout for activations of `dtype`, and a C compiler was found."""
    if device.type != "cpu" or choose_kernel(f"int{bits}", dtype, 1, "cpu").name != "native gemv":
        return False
    whole_words = group_size % (32 // bits) == 0 and group_size <= in_features
    return whole_words and isinstance(native.load(_SOURCE), ctypes.CDLL)


def empty(bits: int, out_features: int, in_features: int, group_size: int) -> PackedWeight:
    """A weight of that size with nothing in it; `round_rows` fills it."""
    blocks, groups = -(-out_features // native.ROWS), -(-in_features // group_size)
    words = groups * group_size * bits // 32
    codes = pages.empty((blocks, words, native.ROWS), torch.int32)
    scales = torch.empty(blocks, groups, native.ROWS)
    return PackedWeight(bits, group_size, out_features, in_features, "interleaved", codes, scales)


def round_rows(rows: torch.Tensor, packed: PackedWeight, start: int) -> None:
    """Put rows [count, in], float32 or bfloat16 and contiguous, into `packed` from its row `start` on.

    `start` is a multiple of 16, and so is `count` unless these are the last rows. Several threads may do it at once.
    """
    _round(rows, native.DTYPES[rows.dtype], 0, rows.shape[0], rows.shape[1], packed, start)


def round_blocks(number: int, blocks: torch.Tensor, count: int, packed: PackedWeight, start: int) -> None:
    """The same for `count` rows that are stored in blocks (uint8) of the ggml type `number` (gguf_blocks.TYPES)."""
    _round(blocks, 0, number, count, packed.in_features, packed, start)


def _round(
    rows: torch.Tensor, dtype: int, number: int, count: int, in_features: int, packed: PackedWeight, start: int
) -> None:
    assert start % native.ROWS == 0 and start + count <= packed.out_features and in_features == packed.in_features
    assert rows.is_contiguous()
    block = start // native.ROWS
    failed = _library().qwenfit_round(
        packed.bits,
        rows.data_ptr(),
        dtype,
        number,
        count,
        in_features,
        packed.group_size,
        packed.codes[block].data_ptr(),
        packed.scales[block].data_ptr(),
    )
    assert not failed, (number, packed.group_size)


@functools.cache
def _library() -> ctypes.CDLL:
    library = native.load(_SOURCE)
    assert isinstance(library, ctypes.CDLL), library
    number, long, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    library.qwenfit_round.argtypes = [number, pointer, number, number, long, long, long, pointer, pointer]
    return library
