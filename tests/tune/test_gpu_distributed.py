"""One process that torchrun started, over nccl: each way of spreading a network trains as no spreading does."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tune.tiny import result_of, save_hf

TESTS = Path(__file__).parents[1]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SETTINGS = {"max_steps": 4, "lr": 3e-3, "grad_accum": 2, "method": "lora-emb"}
WAYS = {"copies": {"zero": 0}, "zero2": {"zero": 2}, "zero3": {"zero": 3}}
if importlib.util.find_spec("deepspeed") is not None:
    WAYS |= {"deepspeed2": {"zero": 2, "deepspeed": True}, "deepspeed3": {"zero": 3, "deepspeed": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nccl")
    save_hf(folder / "base")
    cases = [{"name": f"{p}-{way}", "settings": SETTINGS | s | {"precision": p}} for p in ("fp32", "bf16")
             for way, s in WAYS.items()]  # fmt: skip
    stopped = {"name": "stopped", "settings": cases[2]["settings"], "die": [0, 5, "stop"]}
    resumed = {"name": "resumed", "output": "stopped", "settings": stopped["settings"] | {"resume": True}}
    (folder / "cases.json").write_text(json.dumps([*cases, stopped, resumed]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    done = subprocess.run(
        [*command, str(TESTS / "tune/distributed/ranks.py"), str(folder), "cuda"],
        env=os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("way", list(WAYS)[1:])
@pytest.mark.parametrize(("precision", "apart"), [("fp32", 1e-3), ("bf16", 0.03)])
def test_one_process_over_nccl_trains_as_copies_do(folder, precision, apart, way):
    wanted = losses(folder / f"{precision}-copies")
    assert len(set(wanted)) == 4
    assert losses(folder / f"{precision}-{way}") == pytest.approx(wanted, abs=apart)


def test_a_stopped_run_goes_on(folder):
    assert "Resuming from step-00000003." in json.loads((folder / "resumed.0.json").read_text())["said"]
    assert result_of(folder / "stopped").keys() == result_of(folder / "fp32-zero3").keys()
    assert losses(folder / "stopped") == pytest.approx(losses(folder / "fp32-zero3"), abs=1e-3)
