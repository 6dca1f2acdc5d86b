"""Bytes of checkpoint files into tensors, by several threads."""

from __future__ import annotations

import io
import math
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from qwenfit.errors import BadFile

BLOCK_BYTES = 1 << 22  # of a stored tensor that a thread reads at once
MAX_THREADS = 4
_ONE_READER = threading.Lock()
_THREAD = threading.local()


@dataclass(frozen=True)
class Job:
    """A piece of reading that no other depends on, and the bytes of the checkpoint that it stands for."""

    work: Callable[[], None]
    nbytes: int


def run(jobs: Iterable[Job], done: Callable[[int], None] | None = None) -> None:
    """Do the jobs, in order of their start, on up to MAX_THREADS threads; `done(bytes)` is told of each.

    The first exception ends the rest and is raised, KeyboardInterrupt and what `done` raises included.
    """
    processors = _processors()
    pool = ThreadPoolExecutor(min(MAX_THREADS, len(processors) or os.cpu_count() or 1), initializer=_unpin(processors))
    try:
        futures = {pool.submit(job.work): job.nbytes for job in jobs}
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, timeout=0.1, return_when=FIRST_EXCEPTION)
            for future in finished:
                future.result()
                if done is not None:
                    done(futures[future])
    finally:
        pool.shutdown(cancel_futures=True)


def _processors() -> set[int]:
    """What the threads of this process may run on, all together: each may be pinned to one (kernels/threads.py)."""
    if not sys.platform.startswith("linux"):
        return set()
    found: set[int] = set()
    for thread in Path("/proc/self/task").iterdir():
        try:
            found |= os.sched_getaffinity(int(thread.name))
        except ProcessLookupError:  # it ended meanwhile
            continue
    return found


def _unpin(processors: set[int]) -> Callable[[], None]:
    """What a new thread does first: it inherits the one processor of a pinned caller."""

    def spread() -> None:
        if processors:
            os.sched_setaffinity(0, processors)

    return spread


def scratch(purpose: str, nbytes: int) -> torch.Tensor:
    """uint8 [nbytes] of this thread, overwritten by the next call for this purpose; kept, to be used again."""
    held: torch.Tensor | None = getattr(_THREAD, purpose, None)
    if held is None or held.numel() < nbytes:
        held = torch.empty(nbytes, dtype=torch.uint8)
        setattr(_THREAD, purpose, held)
    return held[:nbytes]


def read_plain_rows(file: io.FileIO, offset: int, stored_dtype: torch.dtype, out: torch.Tensor) -> None:
    """Fill `out` from the elements at byte `offset`: straight into its memory where that is possible, else by blocks.

    Raises BadFile when the file ends early (it was changed after its header was checked).
    """
    if out.device.type == "cpu" and out.dtype == stored_dtype and out.is_contiguous():
        read_exactly(file, offset, out)
        return
    row_bytes = math.prod(out.shape[1:]) * stored_dtype.itemsize
    step = max(1, BLOCK_BYTES // row_bytes)
    for row in range(0, out.shape[0], step):
        target = out[row : row + step]
        block = scratch("stored", target.shape[0] * row_bytes).view(stored_dtype).view(target.shape)
        read_exactly(file, offset + row * row_bytes, block)
        target.copy_(block)


def read_exactly(file: io.FileIO, offset: int, out: torch.Tensor) -> None:
    """Fill a contiguous CPU tensor with the bytes at `offset`."""
    part = memoryview(out.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]  # numpy's stub lacks Buffer
    done = 0
    while done < len(part):
        count = _read_at(file, offset + done, part[done:])
        if not count:
            raise BadFile(f"{file.name} ends inside a tensor: it changed while it was read.")
        done += count


def _read_at(file: io.FileIO, offset: int, part: memoryview) -> int:
    if sys.platform != "win32":
        return os.preadv(file.fileno(), [part], offset)
    with _ONE_READER:  # Windows has no reads at a position
        file.seek(offset)
        return file.readinto(part)
