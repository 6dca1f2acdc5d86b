"""Memory for weights, in huge pages where the system gives them: 2 MiB at a page fault instead of 4 KiB.

Under virtualisation the faults of small pages take longer than reading the file; decoding reads huge ones faster too.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import torch

HUGE = 1 << 21  # bytes, of x86 and of Arm with 4 KiB pages
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """An uninitialised tensor; on a CPU the whole huge pages inside it are asked for as such. Takes no more memory."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if tensor.device.type == "cpu" and tensor.nbytes >= HUGE and setting() in ("madvise", "always"):
        first = -(-tensor.data_ptr() // HUGE) * HUGE
        length = (tensor.data_ptr() + tensor.nbytes - first) // HUGE * HUGE
        if length > 0:
            _madvise()(first, length, 14)  # MADV_HUGEPAGE: advice, so its failure changes nothing but speed
    return tensor


@functools.cache
def setting() -> str:
    """What the system says of transparent huge pages: "always", "madvise" or "never"; empty where it has none."""
    if not sys.platform.startswith("linux") or not _SETTING.exists():
        return ""
    return _SETTING.read_text().partition("[")[2].partition("]")[0]


@functools.cache
def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
