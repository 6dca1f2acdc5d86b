"""Thread counts follow what the process may use; each thread keeps to a processor of its own."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from qwenfit.detect.cgroup import Limits
from qwenfit.kernels import threads

PIN = """
import os, sys
from qwenfit.kernels.threads import configure_threads, unpin
import torch
result = configure_threads()
masks = [os.sched_getaffinity(int(t)) for t in os.listdir("/proc/self/task")]
pinned = sorted(next(iter(mask)) for mask in masks if len(mask) == 1)
own = os.sched_getaffinity(0)
torch.ones(512, 512) @ torch.ones(512, 512)
unpin(result)
after = sorted(os.sched_getaffinity(0))
print(result.count, torch.get_num_threads(), list(result.processors), pinned, sorted(own), after)
"""


def run(**environment):
    """A fresh process, where no OpenMP thread has started."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))} | environment
    script = subprocess.run([sys.executable, "-c", PIN], env=clean, capture_output=True, text=True, check=True)
    return script.stdout.strip()


@pytest.fixture
def several():
    processors = threads.available_processors()
    if len(processors) < 2 or threads.usable_count() != len(processors):
        pytest.skip("needs two or more processors of one core each, and no quota")
    return list(processors)


def test_every_thread_gets_its_own_processor(several):
    expected = [len(several), len(several), several, several, several[:1], several]
    assert run() == " ".join(map(str, expected))


def test_the_environment_wins(several):
    assert run(OMP_PROC_BIND="false").split()[2] == "[]"


def test_a_quota_lowers_the_count_but_never_to_zero(monkeypatch):
    monkeypatch.setattr(threads, "read_cpuinfo", lambda: SimpleNamespace(cores=8))
    for quota, expected in ((None, 8), (2.5, 2), (0.5, 1), (64.0, 8)):
        monkeypatch.setattr(threads, "read_limits", lambda quota=quota: Limits(cpus=quota))
        assert threads.usable_count() == expected


def test_part_of_a_machine_is_left_to_the_scheduler(monkeypatch):
    import torch

    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    monkeypatch.setattr(threads, "available_processors", lambda: (0, 1, 2, 3))
    try:
        result = threads.configure_threads(1)
    finally:
        torch.set_num_threads(before)
    assert result.count == 1 and result.processors == () and "1 of 4" in result.reason
