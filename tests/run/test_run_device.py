"""What a run takes when no device is named: a GPU that torch can use, and never the CPU in silence beside one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwenfit.detect import cpu_host
from qwenfit.errors import UsageError
from qwenfit.hardware import find_device
from qwenfit.run.planned import run_device


def this_machine_has(monkeypatch: pytest.MonkeyPatch, card: str, cuda: bool) -> None:
    device = replace(find_device(card), free_bytes=2**33, detected=True)
    monkeypatch.setattr("qwenfit.detect.detect_hardware", lambda: [device] + [cpu_host()] * (device.kind == "gpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)


def test_a_gpu_that_torch_cannot_use_is_said_and_not_left_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    this_machine_has(monkeypatch, "RTX 3090", cuda=False)
    for name in (None, "cuda"):
        with pytest.raises(UsageError, match="which the installed torch") as refused:
            run_device(name)
        assert refused.value.hint and "--device cpu" in refused.value.hint
    assert run_device("cpu").kind == "cpu"


def test_the_gpu_is_taken_where_torch_can_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    this_machine_has(monkeypatch, "RTX 3090", cuda=True)
    assert run_device(None).name == run_device("cuda").name == "RTX 3090"


def test_a_mac_runs_on_its_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    this_machine_has(monkeypatch, "Apple M2 Max 64GB", cuda=False)
    assert run_device(None).kind == "cpu"
