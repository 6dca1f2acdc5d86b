"""How many CPU threads to use, and on which processors they stay.

Unpinned, a guest's scheduler at times leaves both threads of a matrix product on one processor, and decoding runs
at half its speed. Each thread that multiplies has its own pool of OpenMP workers, so the thread that runs the model
must be the one to call `configure_threads`, before it computes anything.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from qwenfit.detect.cgroup import read_limits
from qwenfit.detect.cpu import read_cpuinfo


@dataclass(frozen=True)
class Threads:
    count: int
    processors: tuple[int, ...]  # that the threads are pinned to, the caller first; empty when they are not
    reason: str


def configure_threads(count: int | None = None) -> Threads:
    """Set torch's threads to `count` (default: all the processors this process may use) and pin each to its processor.

    Pins only when the threads fill every available processor: on part of a machine, another process might pin itself
    to the same part. Threads that the caller starts afterwards inherit its one processor; see `unpin`.
    """
    processors = available_processors()
    count = count or usable_count()
    torch.set_num_threads(count)
    if "OMP_PROC_BIND" in os.environ or "GOMP_CPU_AFFINITY" in os.environ:
        return Threads(count, (), "the environment (OMP_PROC_BIND) says where the OpenMP threads run")
    if count == 1 or count != len(processors):
        return Threads(count, (), f"{count} of {len(processors)} available processors: left to the scheduler")
    workers = _start_workers()
    if len(workers) != count - 1:
        return Threads(count, (), "the OpenMP threads were running before they could be pinned")
    for thread, processor in zip([0, *workers], processors, strict=True):  # 0 is the caller
        os.sched_setaffinity(thread, {processor})
    return Threads(count, processors, "one thread on each available processor")


def unpin(threads: Threads) -> None:
    """For a thread or process started by a pinned one: may run on all of the processors again."""
    if threads.processors:
        os.sched_setaffinity(0, threads.processors)


def available_processors() -> tuple[int, ...]:
    """The processors in this process's affinity mask: what taskset or a container's cpuset leaves."""
    return tuple(sorted(os.sched_getaffinity(0)))


def usable_count() -> int:
    """One thread for each physical core left to this process, no more than its CPU quota, at least one."""
    cores, quota = read_cpuinfo().cores, read_limits().cpus
    return max(1, cores if quota is None else min(cores, int(quota)))


def _start_workers() -> list[int]:
    """Make OpenMP start the caller's pool; the ids of the threads that came with it."""
    before = _thread_ids()
    torch.ones(1 << 20).sum()
    return sorted(_thread_ids() - before)


def _thread_ids() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}
