"""The tensors of a GGUF file, dequantised by the `gguf` package a block of rows at a time."""

from __future__ import annotations

import io
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

from qwenfit.checkpoint.headers_gguf import GGML_TYPES, read_gguf_header
from qwenfit.checkpoint.weights import BLOCK_BYTES, THREADS, read_exactly, read_plain_rows
from qwenfit.config import TensorInfo
from qwenfit.errors import missing_extra

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What gguf.quants can dequantise (gguf 0.19); integers, F64 and Q8_K never hold weights.
QUANTIZED = frozenset({
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "MXFP4",
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS",
})  # fmt: skip
BLOCK_ELEMENTS = 1 << 18  # dequantised at once by a thread: the float32 copies that the package makes stay in cache


class GGUFSource:
    """A .gguf file as a `WeightSource`. The header is read and checked on construction."""

    gguf = True

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        stored = sorted(read_gguf_header(path).tensors, key=lambda tensor: tensor.offset)
        self.tensors = {t.name: TensorInfo(t.name, t.type_name, t.shape, t.nbytes) for t in stored}
        self._stored = {t.name: t for t in stored}
        self._file = io.FileIO(path)
        self._staging = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
        self._gguf = _package() if any(t.type_name in QUANTIZED for t in stored) else None

    def is_floating(self, name: str) -> bool:
        kind = self.tensors[name].dtype
        return kind in PLAIN or kind in QUANTIZED

    def read_rows(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with rows `start` onwards of a stored tensor, converted to out's dtype and device."""
        tensor = self._stored[name]
        _, block_elements, block_bytes = GGML_TYPES[tensor.ggml_type]
        width = math.prod(out.shape[1:])
        row_bytes = width // block_elements * block_bytes
        if tensor.type_name in PLAIN:
            read_plain_rows(self._file, tensor.offset + start * row_bytes, PLAIN[tensor.type_name], out, self._staging)
            return
        assert self._gguf is not None
        quantization_type = self._gguf.GGMLQuantizationType(tensor.ggml_type)
        dequantize = self._gguf.quants.dequantize
        step = max(1, BLOCK_ELEMENTS // width)

        def fill(row: int) -> None:
            target = out[row : row + step]
            raw = torch.empty(target.shape[0] * row_bytes, dtype=torch.uint8)
            read_exactly(self._file, tensor.offset + (start + row) * row_bytes, raw)
            values = dequantize(raw.numpy()[None], quantization_type)  # one long row: the package loops over rows
            target.copy_(torch.from_numpy(values).view(target.shape))

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(fill, range(0, out.shape[0], step)))


def _package() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise missing_extra("gguf", "gguf") from None
    return gguf
