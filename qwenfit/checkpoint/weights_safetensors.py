"""The tensors of a safetensors checkpoint, one file or several, read straight into their final place."""

from __future__ import annotations

import io
import math
from pathlib import Path

import torch

from qwenfit.checkpoint.headers_safetensors import read_checkpoint_headers
from qwenfit.checkpoint.weights import BLOCK_BYTES, FLOAT_DTYPES, PLAIN_DTYPES, read_plain_rows
from qwenfit.config import TensorInfo
from qwenfit.errors import NotFound


class SafetensorsSource:
    """A folder's safetensors files as a `WeightSource`. The headers are read and checked on construction."""

    gguf = False

    def __init__(self, folder: Path | str) -> None:
        self.path = str(folder)
        self.tensors: dict[str, TensorInfo] = {}
        self._places: dict[str, tuple[io.FileIO, int]] = {}
        self._staging = torch.empty(BLOCK_BYTES, dtype=torch.uint8)
        headers = read_checkpoint_headers(folder)
        if not headers:
            raise NotFound(
                f"{folder} has a config but no weights.",
                "Download the weights too, or measure without them: qwenfit bench decode MODEL.",
            )
        for header in headers.values():
            file = io.FileIO(header.path)
            for name, stored in sorted(header.tensors.items(), key=lambda item: item[1].begin):
                self.tensors[name] = TensorInfo(name, stored.dtype, stored.shape, stored.nbytes)
                self._places[name] = (file, header.data_start + stored.begin)

    def is_floating(self, name: str) -> bool:
        return self.tensors[name].dtype in FLOAT_DTYPES

    def read_rows(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with rows `start` onwards of a stored tensor, converted to out's dtype and device."""
        file, offset = self._places[name]
        dtype = PLAIN_DTYPES[self.tensors[name].dtype]
        read_plain_rows(file, offset + start * math.prod(out.shape[1:]) * dtype.itemsize, dtype, out, self._staging)
