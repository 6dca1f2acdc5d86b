"""Random weights in a model's shapes, to measure without a download: as fast as memory fills, and never zeros."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from qwenfit.checkpoint.expected import Parameter, stored_parameters
from qwenfit.config import ModelConfig
from qwenfit.kernels.packed import PackedWeight, pack
from qwenfit.quantize.types import QuantizedWeight

if TYPE_CHECKING:
    from qwenfit.kernels.triton.int_matvec import BlockedWeight

POOL_SIZE = (1 << 22) + 15  # odd, so that repetitions of the pool do not line up with rows


class RandomWeights:
    """Parameters drawn from one seeded pool of normal values and one of bytes, each from its own offset.

    Matrices have a standard deviation of 1 / sqrt(in): the residual stream then grows by about one per layer and stays
    finite in 16 bits.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.parameters = stored_parameters(replace(config, quantization=None), gguf=False)
        self._seed = seed
        self._normal = {torch.float32: torch.randn(POOL_SIZE, generator=generator)}
        self._bytes = torch.randint(0, 256, (POOL_SIZE,), dtype=torch.uint8, generator=generator)
        self._packed: dict[tuple[tuple[int, ...], int], PackedWeight | BlockedWeight] = {}

    def in_file_order(self) -> list[Parameter]:
        return list(self.parameters.values())

    def stored_size(self, parameter: Parameter) -> int:
        """Elements: the bytes depend on what the loader makes of them."""
        return math.prod(parameter.shape)

    def read_rows(self, parameter: Parameter, start: int, out: torch.Tensor) -> None:
        """Fill `out` with rows `start` onwards of a parameter."""
        if out.dtype not in self._normal:
            self._normal[out.dtype] = self._normal[torch.float32].to(out.dtype)
        row_size = math.prod(parameter.shape[1:])
        _tile(self._normal[out.dtype], self._offset(parameter) + start * row_size, out.view(-1))
        if len(parameter.shape) == 2:
            out.mul_(parameter.shape[1] ** -0.5)
        elif parameter.suffix == "bias":
            out.mul_(0.02)
        else:
            out.mul_(0.02).add_(1)  # a norm's weight

    def packed(
        self, parameter: Parameter, bits: int, group_size: int, dtype: torch.dtype, device: torch.device
    ) -> PackedWeight | BlockedWeight:
        """A matrix of random integers with the scale that gives its deviation, in the kernels' layout.

        Packing costs more than filling memory, so it is done once for a shape. Any bytes are codes in every layout:
        a layer of the same shape is a copy with its codes filled anew.
        """
        key = (parameter.shape, bits)
        if key not in self._packed:
            self._packed[key] = pack(self._integers(parameter, bits, group_size), dtype, device)
        first = self._packed[key]
        codes = torch.empty_like(first.codes)
        _tile(self._bytes, self._offset(parameter), codes.view(-1).view(torch.uint8))
        return replace(first, codes=codes, scales=first.scales.clone())

    def _integers(self, parameter: Parameter, bits: int, group_size: int) -> QuantizedWeight:
        out_features, in_features = parameter.shape
        q = torch.empty(out_features, in_features, dtype=torch.uint8)
        _tile(self._bytes & (2**bits - 1), self._offset(parameter), q.view(-1))
        deviation = math.sqrt((4.0**bits - 1) / 12)  # of integers uniform on 0 .. 2**bits - 1
        scales = torch.full((out_features, -(-in_features // group_size)), in_features**-0.5 / deviation)
        return QuantizedWeight(bits, group_size, q, scales, torch.full_like(scales, 2 ** (bits - 1)))

    def _offset(self, parameter: Parameter) -> int:
        return zlib.crc32(f"{self._seed} {parameter.name}".encode()) % POOL_SIZE


def _tile(pool: torch.Tensor, offset: int, out: torch.Tensor) -> None:
    """out[i] = pool[(offset + i) mod its size], copied in runs."""
    done, at = 0, offset % pool.numel()
    while done < out.numel():
        count = min(pool.numel() - at, out.numel() - done)
        out[done : done + count].copy_(pool[at : at + count])
        done, at = done + count, 0
