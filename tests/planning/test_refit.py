"""The fit of the decode constants finds those that made the data, and says what it needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qwenfit.bench.refit import Step, fit, main, predicted, steps_of
from qwenfit.planning.stack import READ_KINDS

RECORD, *SEVERAL = (Path(__file__).parents[2] / f"measurements/gpu-decode-h200-{n}.json" for n in (2, 8, 15))


def recorded() -> list[Step]:
    return [step for path in (RECORD, *SEVERAL) for step in steps_of(json.loads(path.read_text()))]


def test_the_constants_that_made_the_times_are_found() -> None:
    shares = {"plain": 0.9, "int8": 0.95, "int4": 0.6, "cache": 0.8, "cache_int8": 0.5, "plain_rows": 0.8}
    shares |= {"cache_rows": 0.9, "cache_int8_rows": 0.85}
    steps = recorded()
    steps += [replace(step, card="another") for step in steps]  # whose int4 is faster, all else as it is
    true = {f"{kind} {card}": share for kind, share in shares.items() for card in ("H200-SXM-141GB", "another")}
    true |= {"layer_gap": 1e-5, "int4 another": 0.9}  # these runs replay the graph alone: no host
    found = fit([replace(step, seconds=predicted(step, true)) for step in steps])
    assert found == {name: pytest.approx(value, rel=0.02) for name, value in true.items()}


def test_no_share_is_above_a_plain_read_and_no_time_below_nothing() -> None:
    steps = recorded()
    found = fit([replace(step, seconds=step.seconds / 3) for step in steps])
    assert all(0 < found[f"{kind} {steps[0].card}"] <= 1 for kind in READ_KINDS) and found["layer_gap"] >= 0


def test_the_command_prints_constants_and_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(RECORD)]) == 0
    printed = capsys.readouterr().out
    assert "layer_gap" in printed and "Qwen-72B int4" in printed
    assert main([]) == 2
    assert main(["missing.json"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "cannot read missing.json: No such file or directory"
