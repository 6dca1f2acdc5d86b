"""The tensors of a safetensors checkpoint, one file or several, read straight into their final place."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable

import torch

from qwenfit.checkpoint.reading import read_plain_rows
from qwenfit.checkpoint.weights import FLOAT_DTYPES, PLAIN_DTYPES
from qwenfit.config import TensorInfo


class SafetensorsSource:
    """The tensors that the headers of a folder's safetensors files list, as a `WeightSource`."""

    gguf = False

    def __init__(self, folder: str, tensors: Iterable[TensorInfo]) -> None:
        """`tensors` with their files and offsets, from checked headers. Raises OSError when a file is gone by now."""
        self.path = folder
        stored = sorted(tensors, key=lambda tensor: (tensor.file, tensor.offset))
        self.tensors = {tensor.name: tensor for tensor in stored}
        self._files = {name: io.FileIO(name) for name in sorted({tensor.file for tensor in stored})}

    def dtype_of(self, name: str) -> torch.dtype:
        return PLAIN_DTYPES[self.tensors[name].dtype]

    def is_floating(self, name: str) -> bool:
        return self.tensors[name].dtype in FLOAT_DTYPES

    def block_type(self, name: str) -> int:
        return 0

    def read_blocks(self, name: str, start: int, count: int) -> torch.Tensor:
        raise AssertionError(name)

    def read_rows(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with rows `start` onwards of a stored tensor, converted to out's dtype and device."""
        info = self.tensors[name]
        dtype = self.dtype_of(name)
        skipped = start * math.prod(info.shape[1:]) * dtype.itemsize
        read_plain_rows(self._files[info.file], info.offset + skipped, dtype, out)
