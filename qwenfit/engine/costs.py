"""What it takes a host to launch a step with prompts in it, kernel by kernel: a replay takes next to nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from qwenfit.model.kv_cache import KVCache


@dataclass(frozen=True)
class Costs:
    """Seconds, as measured at the start."""

    launching: float  # of the host, for one step
    context: float  # of the device, to read a cached token

    @classmethod
    def measured(cls, launch: Callable[[], object], cache: KVCache) -> Costs:
        """launch: gives a step with prompts to the device, and has been called before."""
        launching = seconds(launch, wait=False)
        some = cache.layers[0].key.flatten().view(torch.int64)
        reading = seconds(some.amax) / some.nbytes
        return cls(launching, reading * cache.nbytes / (cache.num_blocks * cache.block_size))


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
