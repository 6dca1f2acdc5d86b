"""The fit of the decode constants finds those that made the data, and says what it needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwenfit.bench.refit import UNKNOWNS, Step, fit, main, predicted, steps_of
from qwenfit.planning.stack import READ_KINDS

RECORD = Path(__file__).parents[2] / "measurements/gpu-decode-h200-2.json"


def test_the_constants_that_made_the_times_are_found() -> None:
    true = {
        "plain": 0.9,
        "int8": 0.95,
        "int4": 0.6,
        "cache": 0.8,
        "cache_int8": 0.5,
        "plain_rows": 0.8,
        "layer_gap": 1e-5,
    }
    steps = list(steps_of(json.loads(RECORD.read_text())))
    found = fit([Step(s.what, s.terms, predicted(s, true)) for s in steps])
    assert set(found) == set(UNKNOWNS) - {"step_host"}  # these runs replay the graph alone
    assert found == {name: pytest.approx(value, rel=0.02) for name, value in true.items()}


def test_no_share_is_above_a_plain_read_and_no_time_below_nothing() -> None:
    steps = list(steps_of(json.loads(RECORD.read_text())))
    found = fit([Step(s.what, s.terms, s.seconds / 3) for s in steps])
    assert all(0 < found[kind] <= 1 for kind in READ_KINDS) and found["layer_gap"] >= 0


def test_the_command_prints_constants_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RECORD)]) == 0
    printed = capsys.readouterr().out
    assert "layer_gap" in printed and "Qwen-72B int4" in printed
    assert main([]) == 2
