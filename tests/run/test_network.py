"""`qwenfit doctor --network`: the command it offers, the figures it takes, and when ZeRO-3 makes sense."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from qwenfit.config import ModelConfig
from qwenfit.hardware import find_device
from qwenfit.planning.planner import resolve
from qwenfit.run.network import Link, Sense, as_text, sense_of

ROOT = Path(__file__).parents[2]
QWEN: ModelConfig = resolve("Qwen-7B")
A100 = find_device("A100-SXM4-80GB")


def run(words: list[str]) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_alone_it_says_what_to_type_and_that_measures():
    said = run(["-m", "qwenfit", "doctor", "--network"])
    command = shlex.split(next(line for line in said.splitlines() if "torchrun" in line))
    assert command[:2] == ["torchrun", "--nproc-per-node"]
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command[3:], "--json"]
    found = json.loads(run(words))
    assert found["processes"] == 2
    assert {link["operation"] for link in found["links"]} == {"all-reduce", "all-gather"}
    for link in found["links"]:  # two processes: an all-reduce crosses each link once, an all-gather half
        crossed = link["size"] * (1.0 if link["operation"] == "all-reduce" else 0.5)
        assert 0 < link["seconds"] < 60 and abs(link["bus"] * link["seconds"] / crossed - 1) < 1e-6
    assert found["zero3"]["model"] == "Qwen-7B"


def test_the_link_time_is_the_bytes_that_zero_sends_over_the_bandwidth():
    sense = sense_of(QWEN, A100, 4, 10e9)
    weights = 2 * QWEN.parameters
    passes = 2  # of four micro-batches of 1024 tokens each
    assert abs(sense.link / (passes * 3 * weights * 0.75 / 10e9) - 1) < 0.01  # gathered twice, scattered once
    assert abs(sense.zero2_link / (passes * weights * 0.75 / 10e9) - 1) < 0.01


def test_zero3_makes_sense_over_nvlink_and_not_over_gigabit_ethernet():
    assert sense_of(QWEN, A100, 8, 200e9).worth
    slow = sense_of(QWEN, A100, 8, 0.11e9)
    assert not slow.worth
    text = as_text([Link("all-gather", 1 << 20, 0.01, 0.05e9)], slow, 8)
    assert "does not make sense" in text and "--zero 2" in text and "10,000 us" in text
    assert "It makes sense." in Sense("m", 10.0, 1.0, 0.5).text()
