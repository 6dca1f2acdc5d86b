"""Random weights in a model's shapes, to measure without a download: as fast as memory fills, and never zeros."""

from __future__ import annotations

import math
import zlib

import torch

from qwenfit.checkpoint.expected import Parameter, stored_parameters
from qwenfit.config import ModelConfig
from qwenfit.quantize.types import QuantizedWeight

POOL_SIZE = (1 << 22) + 15  # odd, so that repetitions of the pool do not line up with rows


class RandomWeights:
    """Parameters drawn from one seeded pool of normal values, each from its own offset.

    Matrices have a standard deviation of 1 / sqrt(in): the residual stream then grows by about one per layer and stays
    finite in 16 bits. With `config.quantization` the layer linears are random integers with the scale that gives the
    same deviation.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.config = config
        self.parameters = stored_parameters(config, gguf=False)
        self._seed = seed
        self._normal = torch.randn(POOL_SIZE, generator=generator)
        self._typed = {torch.float32: self._normal}
        if config.quantization is not None:
            top = 2**config.quantization.bits
            self._integers = torch.randint(0, top, (POOL_SIZE,), dtype=torch.uint8, generator=generator)

    def in_file_order(self) -> list[Parameter]:
        return list(self.parameters.values())

    def stored_size(self, parameter: Parameter) -> int:
        """Elements: the bytes depend on what the loader makes of them."""
        return math.prod(parameter.shape)

    def read_rows(self, parameter: Parameter, start: int, out: torch.Tensor) -> None:
        """Fill `out` with rows `start` onwards of a parameter."""
        pool = self._typed.setdefault(out.dtype, self._normal.to(out.dtype))
        row_size = math.prod(parameter.shape[1:])
        _tile(pool, self._offset(parameter) + start * row_size, out.view(-1))
        if len(parameter.shape) == 2:
            out.mul_(parameter.shape[1] ** -0.5)
        elif parameter.suffix == "bias":
            out.mul_(0.02)
        else:
            out.mul_(0.02).add_(1)  # a norm's weight

    def quantized(self, parameter: Parameter) -> QuantizedWeight:
        """Random integers of all values, with one scale for the matrix, symmetric, on the CPU."""
        quantization = self.config.quantization
        assert quantization is not None
        out_features, in_features = parameter.shape
        bits, middle = quantization.bits, 2 ** (quantization.bits - 1)
        q = torch.empty(out_features, in_features, dtype=torch.uint8)
        _tile(self._integers, self._offset(parameter), q.view(-1))
        deviation = math.sqrt((4.0**bits - 1) / 12)  # of integers uniform on 0 .. 2**bits - 1
        groups = -(-in_features // quantization.group_size)
        scales = torch.full((out_features, groups), in_features**-0.5 / deviation)
        return QuantizedWeight(bits, quantization.group_size, q, scales, torch.full_like(scales, middle))

    def _offset(self, parameter: Parameter) -> int:
        return zlib.crc32(f"{self._seed} {parameter.name}".encode()) % POOL_SIZE


def _tile(pool: torch.Tensor, offset: int, out: torch.Tensor) -> None:
    """out[i] = pool[(offset + i) mod its size], copied in runs."""
    done, at = 0, offset % pool.numel()
    while done < out.numel():
        count = min(pool.numel() - at, out.numel() - done)
        out[done : done + count].copy_(pool[at : at + count])
        done, at = done + count, 0
