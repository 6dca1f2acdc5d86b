"""A checkpoint as a set of stored tensors, and the canonical parameters that they make up.

`WeightSource` reads stored tensors by rows; safetensors and GGUF have one each. `CanonicalWeights` checks a source
against a ModelConfig before anything is allocated, then reads canonical parameters out of it, whole or by rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import torch

from qwenfit.checkpoint import gptq
from qwenfit.checkpoint.expected import Parameter, check_layers, check_tensors, stored_parameters, surplus_tensors
from qwenfit.checkpoint.reading import BLOCK_BYTES, Job, run
from qwenfit.config import ModelConfig, TensorInfo
from qwenfit.errors import BadFile
from qwenfit.quantize.types import QuantizedWeight

FLOAT_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PLAIN_DTYPES = {**FLOAT_DTYPES, "int32": torch.int32}


class WeightSource(Protocol):
    """The stored tensors of one checkpoint."""

    path: str  # for messages
    gguf: bool
    tensors: dict[str, TensorInfo]  # in the order of the file; shapes are torch's, output rows first

    def read_rows(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out` with rows `start` onwards of a stored tensor, converted to out's dtype and device.

        In the thread of the caller; several threads may call it at once.
        """

    def dtype_of(self, name: str) -> torch.dtype:
        """The type of a stored tensor that holds floating point; float32 when `read_rows` dequantises it to that."""

    def is_floating(self, name: str) -> bool:
        """Whether the stored tensor is floating point, or dequantised to it by `read_rows`."""

    def block_type(self, name: str) -> int:
        """The ggml type of a tensor in blocks that our C code reads (kernels/gguf_blocks.py), else 0."""

    def read_blocks(self, name: str, start: int, count: int) -> torch.Tensor:
        """Rows of such a tensor as they are stored, uint8: scratch memory of this thread, until its next call."""


class CanonicalWeights:
    """The canonical parameters of a checkpoint.

    Raises BadFile, naming the first tensor and the count, when tensors are missing, unexpected, of the wrong shape or
    of a type that no weight has. Only headers are read for that.
    """

    def __init__(self, source: WeightSource, config: ModelConfig) -> None:
        check_layers(source.path, source.tensors, config)
        self.source = source
        self.config = config
        self.parameters = stored_parameters(config, source.gguf)
        self.surplus = surplus_tensors(config, source.gguf, self.parameters)
        expected = {name: shape for p in self.parameters.values() for name, shape in p.stored.items()}
        check_tensors(source.path, source.tensors, expected, self.surplus, source.is_floating, config.architecture)

    @property
    def stored_bytes(self) -> int:
        """Bytes of the file that the parameters take."""
        return sum(self.stored_size(parameter) for parameter in self.parameters.values())

    def stored_size(self, parameter: Parameter) -> int:
        return sum(self.source.tensors[name].nbytes for name in parameter.stored)

    def in_file_order(self) -> list[Parameter]:
        """The parameters in the order in which their first tensor lies in the file."""
        position = {name: i for i, name in enumerate(self.source.tensors)}
        return sorted(self.parameters.values(), key=lambda p: min(position[name] for name in p.stored))

    def jobs(self, parameter: Parameter, start: int, out: torch.Tensor) -> Iterator[Job]:
        """What `read_rows` has to do, in pieces of at most BLOCK_BYTES (and at least a row) that may run at once."""
        stop = start + out.shape[0]
        for piece in parameter.pieces:
            name = f"{piece.stored}.{parameter.suffix}"
            row_bytes = self.source.tensors[name].nbytes // (piece.stop - piece.start)
            step = max(1, BLOCK_BYTES // row_bytes)
            last = min(stop, piece.stop)
            for first in range(max(start, piece.start), last, step):
                rows = out[first - start : min(first + step, last) - start]
                read = partial(self.source.read_rows, name, first - piece.start, rows)
                yield Job(read, row_bytes * rows.shape[0])

    def read_rows(self, parameter: Parameter, start: int, out: torch.Tensor) -> None:
        """Fill `out` with rows `start` onwards of an unquantized parameter, in out's dtype, on its device."""
        jobs = list(self.jobs(parameter, start, out))
        if len(jobs) > 1:
            run(jobs)
        elif jobs:
            jobs[0].work()

    def stored_dtype(self, parameter: Parameter) -> torch.dtype:
        """The type that all of an unquantized parameter is stored in; float32 where it is dequantised, or mixed."""
        first, *others = {self.source.dtype_of(name) for name in parameter.stored}
        return torch.float32 if others else first

    def in_blocks(self, parameter: Parameter, multiple: int) -> bool:
        """Whether all of it is in blocks that our C code reads, in pieces of a multiple of so many rows."""
        named = all(self.source.block_type(name) for name in parameter.stored)
        return named and all(piece.start % multiple == 0 for piece in parameter.pieces)

    def blocks(self, parameter: Parameter, start: int, stop: int) -> Iterator[tuple[int, int, int, torch.Tensor]]:
        """(first row, rows, ggml type, the blocks of those rows: valid until the next) of a parameter `in_blocks`."""
        for piece in parameter.pieces:
            first, last = max(start, piece.start), min(stop, piece.stop)
            if first < last:
                name = f"{piece.stored}.{parameter.suffix}"
                stored = self.source.read_blocks(name, first - piece.start, last - first)
                yield first, last - first, self.source.block_type(name), stored

    def read(self, parameter: Parameter, dtype: torch.dtype) -> torch.Tensor:
        """One whole parameter on the CPU, dequantised when the checkpoint stores it quantized."""
        if parameter.quantized:
            return self.quantized(parameter).dequantize(dtype)
        out = torch.empty(parameter.shape, dtype=dtype)
        self.read_rows(parameter, 0, out)
        return out

    def quantized(self, parameter: Parameter) -> QuantizedWeight:
        """A layer that the checkpoint stores as GPTQ or AWQ, its parts fused, on the CPU."""
        assert self.config.quantization is not None
        parts = []
        for piece in parameter.pieces:
            names = [name for name in parameter.stored if name.startswith(piece.stored + ".")]
            stored = {name.rpartition(".")[2]: self.read_stored(name) for name in names}
            parts.append(gptq.unpack(piece.stored, stored, self.config.quantization))
        return gptq.concatenate(parameter.module, parts)

    def read_stored(self, name: str) -> torch.Tensor:
        """One stored tensor of a plain type as it is."""
        info = self.source.tensors[name]
        out = torch.empty(info.shape, dtype=PLAIN_DTYPES[info.dtype])
        self.source.read_rows(name, 0, out)
        return out

    def check_surplus(self) -> None:
        """Raises BadFile when a tensor that the network has no place for holds something that would be lost."""
        embedding = self.parameters["embed_tokens.weight"]
        for name, shape in self.surplus.items():
            if name not in self.source.tensors:
                continue
            if len(shape) == 1:
                if bool(self.read_stored(name).count_nonzero()):
                    raise BadFile(
                        f"{self.source.path} has a nonzero {name}, where {self.config.architecture} has no bias."
                    )
            elif not self._same_rows(name, next(iter(embedding.stored)), shape):
                raise BadFile(
                    f"{self.source.path} stores a {name} that differs from the embedding, though its config ties them.",
                    'Set "tie_word_embeddings": false in config.json if the stored head is the right one.',
                )

    def _same_rows(self, first: str, second: str, shape: tuple[int, ...]) -> bool:
        step = max(1, BLOCK_BYTES // (4 * shape[1]))
        a, b = torch.empty(step, shape[1]), torch.empty(step, shape[1])
        for row in range(0, shape[0], step):
            count = min(step, shape[0] - row)
            self.source.read_rows(first, row, a[:count])
            self.source.read_rows(second, row, b[:count])
            if not torch.equal(a[:count], b[:count]):
                return False
        return True
