"""Memory bandwidth of the CPUs as a plain read, with the C library alone."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Collection
from contextlib import suppress

from qwenfit.detect.cpu import allowed_processors

# Far beyond a last-level cache for each thread, so that each pass comes from memory.
BUFFER_BYTES = 256 * 1024**2


def measure_bandwidth(seconds: float = 1.0, threads: int | None = None, buffer_bytes: int = BUFFER_BYTES) -> float:
    """Bytes/s that `threads` threads (default: every CPU allowed) read together, each from a buffer of its own.

    A read is the C library's memchr looking for a byte that is not there: it loads every byte once, with vector
    instructions, writes nothing and runs without the interpreter lock. That is what decoding does with weights.
    The figure is the median of the faster half of the passes, so that another program's burst does not lower it.
    Takes about `seconds` and `threads` x `buffer_bytes` of memory.
    """
    allowed = allowed_processors()
    count = threads or len(allowed)
    readers = [_Reader(buffer_bytes) for _ in range(count)]
    rates: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(rates) < 3 or time.perf_counter() < deadline:
        rates.append(count * buffer_bytes / _pass_seconds(readers, allowed))
    faster = sorted(rates)[len(rates) // 2 :]
    return faster[len(faster) // 2]


class _Reader:
    """One touched buffer and the call that reads it from end to end."""

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # as weights are kept
            with suppress(OSError):
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        self._view = (ctypes.c_char * size).from_buffer(self._memory)
        ctypes.memset(self._view, 1, size)  # untouched pages would all be the one page of zeros
        library = ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)  # type: ignore[attr-defined,unused-ignore]
        self._memchr = library.memchr
        self._memchr.restype = ctypes.c_void_p
        self._memchr.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
        self._size = size

    def read(self, processors: Collection[int] | None = None) -> None:
        if processors and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, processors)  # a thread starts with that of its maker, which OpenMP may have pinned
        if self._memchr(self._view, 0, self._size) is not None:
            raise AssertionError("the buffer holds no zero byte")


def _pass_seconds(readers: list[_Reader], processors: Collection[int]) -> float:
    """Seconds for all readers to read their buffers once, at the same time."""
    threads = [threading.Thread(target=reader.read, args=(processors,)) for reader in readers]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start
