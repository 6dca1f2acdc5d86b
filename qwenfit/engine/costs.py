"""What the parts of a step with a prompt in it take, to tell whether the prompt runs apart from the recorded rest.

One batch reads the weights once, but a host launches it kernel by kernel, which takes longer than a small model's step.
Apart, both are replayed, and the weights are read twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from qwenfit.engine.graphs import DecodeGraphs
    from qwenfit.model.kv_cache import KVCache


@dataclass(frozen=True)
class Costs:
    """Seconds, as measured at the start."""

    launching: float  # of the host, for one batch
    decoding: dict[int, float]  # of the device, for a recorded step by its size, without contexts
    context: float  # of the device, to read a cached token

    def apart(self, decoding: int, context: int, prompt: float) -> bool:
        """Whether a prompt that takes `prompt` seconds, recorded, is best run after the step of `decoding` sequences.

        context: their tokens in the cache. One batch takes as long as the host, or, without it, less than apart.
        """
        step = next((seconds for size, seconds in self.decoding.items() if size >= decoding), None)
        return step is not None and self.launching > step + context * self.context + prompt

    @classmethod
    def measured(cls, launch: Callable[[], object], graphs: DecodeGraphs, cache: KVCache) -> Costs:
        """launch: gives a step with prompts to the device, and has been called before; graphs: recorded."""
        launching = seconds(launch, wait=False)
        decoding = {size: seconds(graphs.recorded(size).replay) for size in graphs.sizes}
        some = cache.layers[0].key.flatten().view(torch.int64)
        reading = seconds(some.amax) / some.nbytes
        return cls(launching, decoding, reading * cache.nbytes / (cache.num_blocks * cache.block_size))


def seconds(run: Callable[[], object], wait: bool = True, times: int = 3) -> float:
    """What the device needs for it, or, unless `wait`, the host: the least of so many times."""
    least = math.inf
    for _ in range(times):
        _synchronize()
        began = time.perf_counter()
        run()
        if wait:
            _synchronize()
        least = min(least, time.perf_counter() - began)
    return least


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
