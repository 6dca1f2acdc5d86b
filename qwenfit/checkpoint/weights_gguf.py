"""The tensors of a GGUF file, dequantised a block of rows at a time.

The common types by gguf_blocks.c, the others, and all where there is no C compiler, by the `gguf` package.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from types import ModuleType

import torch

from qwenfit.checkpoint.headers_gguf import GGML_TYPES
from qwenfit.checkpoint.reading import read_exactly, read_plain_rows, scratch
from qwenfit.config import TensorInfo
from qwenfit.errors import missing_extra
from qwenfit.kernels import gguf_blocks, native

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What gguf.quants can dequantise (gguf 0.19); integers, F64 and Q8_K never hold weights.
QUANTIZED = frozenset({
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4",
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS",
})  # fmt: skip
# Dequantised at once: the file's bytes, and the float32 copies that the package makes, stay in the caches.
BLOCK_ELEMENTS = 1 << 18
_BLOCKS = {name: (number, elements, nbytes) for number, (name, elements, nbytes) in GGML_TYPES.items()}


class GGUFSource:
    """The tensors that the header of a .gguf file lists, as a `WeightSource`."""

    gguf = True

    def __init__(self, path: str, tensors: Iterable[TensorInfo]) -> None:
        """`tensors` with their offsets, from a checked header. Raises OSError when the file is gone by now."""
        self.path = path
        stored = sorted(tensors, key=lambda tensor: tensor.offset)
        self.tensors = {tensor.name: tensor for tensor in stored}
        self._file = io.FileIO(path)
        quantized = {tensor.dtype for tensor in stored} & QUANTIZED
        self._native = gguf_blocks.TYPES if quantized and gguf_blocks.usable() else frozenset()
        self._gguf = _package() if quantized - self._native else None

    def dtype_of(self, name: str) -> torch.dtype:
        return PLAIN.get(self.tensors[name].dtype, torch.float32)

    def is_floating(self, name: str) -> bool:
        kind = self.tensors[name].dtype
        return kind in PLAIN or kind in QUANTIZED

    def block_type(self, name: str) -> int:
        kind = self.tensors[name].dtype
        return _BLOCKS[kind][0] if kind in self._native else 0

    def read_blocks(self, name: str, start: int, count: int) -> torch.Tensor:
        """Rows as they are stored, uint8 in scratch memory of this thread."""
        info = self.tensors[name]
        _, elements, nbytes = _BLOCKS[info.dtype]
        row_bytes = math.prod(info.shape[1:]) // elements * nbytes
        raw = scratch("stored", count * row_bytes)
        read_exactly(self._file, info.offset + start * row_bytes, raw)
        return raw

    def read_rows(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with rows `start` onwards of a stored tensor, converted to out's dtype and device."""
        info = self.tensors[name]
        number, block_elements, block_bytes = _BLOCKS[info.dtype]
        width = math.prod(info.shape[1:])
        if info.dtype in PLAIN:
            offset = info.offset + start * width * block_bytes
            read_plain_rows(self._file, offset, PLAIN[info.dtype], out)
            return
        step = max(1, BLOCK_ELEMENTS // width)
        for row in range(0, out.shape[0], step):
            target = out[row : row + step]
            raw = self.read_blocks(name, start + row, target.shape[0])
            if info.dtype in self._native:
                _dequantise(number, raw, block_bytes, block_elements, target)
            else:
                assert self._gguf is not None
                kind = self._gguf.GGMLQuantizationType(number)
                values = self._gguf.quants.dequantize(raw.numpy()[None], kind)  # one long row: it loops over rows
                target.copy_(torch.from_numpy(values).view(target.shape))


def _dequantise(number: int, raw: torch.Tensor, block_bytes: int, block_elements: int, out: torch.Tensor) -> None:
    """Into `out` itself where gguf_blocks.c can write that, else by way of float32."""
    direct = out.device.type == "cpu" and out.dtype in native.DTYPES and out.is_contiguous()
    values = out if direct else scratch("values", 4 * out.numel()).view(torch.float32).view(out.shape)
    gguf_blocks.dequantise(number, raw, block_bytes, block_elements, values)
    if not direct:
        out.copy_(values)


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise missing_extra("gguf", "gguf") from None
    return gguf
