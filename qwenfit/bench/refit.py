"""The constants of a decode step on a GPU, fitted to records: `python -m qwenfit.bench.refit measurements/X.json ...`.

A step takes (bytes of each kind) / (share x plain read) + layers x gap + what the host adds. The shares, the gap and
the host's time are fitted by least squares on relative errors; all are at least 0, and no share is above 1. Prints the
values that belong into MEASURED of planning/constants.py and, run by run, what they predict.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenfit.catalog import get_model
from qwenfit.hardware import Hardware, find_device
from qwenfit.planning.device_speed import read_bandwidth
from qwenfit.planning.inference_speed import step_reads
from qwenfit.planning.stack import READ_KINDS, get_stack
from qwenfit.planning.task import Inference

UNKNOWNS = (*READ_KINDS, "layer_gap", "step_host")
ROUNDS = 5_000


@dataclass(frozen=True)
class Step:
    """One measured decode step: seconds by unknown at a share of 1 (or its count), and the seconds it took."""

    what: str
    terms: tuple[float, ...]
    seconds: float


def steps_of(record: dict[str, Any]) -> Iterator[Step]:
    """The steps of a record of bench/gpu_decode.py (no host in it) or of `qwenfit bench guide` (the whole engine)."""
    if record["kind"] == "gpu decode":
        for run in record["runs"]:
            mean = run["context"] + run["tokens"] / 2
            task = Inference(max(1, int(mean) - 1), 2, run["batch"], kv_cache=run["kv_cache"])
            yield _step(record["hardware"], run["model"], run["precision"], task, run["ms_per_step"] / 1e3, host=0)
    else:
        for row in record["rows"]:
            if row["measured"] is not None:
                task = Inference(1, row["measured"]["generated"], row["batch"], kv_cache=row["kv_cache"])
                seconds = row["batch"] / row["measured"]["tokens_per_s"]
                yield _step(record["hardware"], row["model"], row["precision"], task, seconds, host=1)


def _step(card: str, model: str, precision: str, task: Inference, seconds: float, host: int) -> Step:
    device = find_device(card)
    stack, config = get_stack("qwenfit"), get_model(model)
    reads = step_reads(config, Hardware(device), task, precision, stack)
    rate = read_bandwidth(device, stack)
    terms = tuple(reads[kind] / rate for kind in READ_KINDS)
    what = f"{model} {precision}, {task.kv_cache} cache, {task.batch} x {task.prompt} + {task.generate}"
    return Step(what, (*terms, config.num_layers, host), seconds)


def fit(steps: Sequence[Step]) -> dict[str, float]:
    """Non-negative least squares on relative errors, by coordinate descent. Shares 1 / x; gap and host in s."""
    least = [1.0] * len(READ_KINDS) + [0.0, 0.0]  # nothing reads faster than a plain read
    x = [1.2] * len(READ_KINDS) + [1e-5, 1e-4]
    rows = [[term / step.seconds for term in step.terms] for step in steps]
    squares = [sum(row[j] ** 2 for row in rows) for j in range(len(x))]
    left = [1 - sum(a * b for a, b in zip(row, x, strict=True)) for row in rows]
    for _ in range(ROUNDS):
        for j, square in enumerate(squares):
            if square == 0:
                continue
            new = max(least[j], x[j] + sum(row[j] * rest for row, rest in zip(rows, left, strict=True)) / square)
            left = [rest - row[j] * (new - x[j]) for row, rest in zip(rows, left, strict=True)]
            x[j] = new
    known = [j for j, square in enumerate(squares) if square > 0]
    return {UNKNOWNS[j]: (1 / x[j] if j < len(READ_KINDS) else x[j]) for j in known}


def predicted(step: Step, constants: dict[str, float]) -> float:
    """Seconds of the step by these constants."""
    total = 0.0
    for name, term in zip(UNKNOWNS, step.terms, strict=True):
        if name in constants:
            total += term / constants[name] if name in READ_KINDS else term * constants[name]
    return total


def main(paths: Sequence[str]) -> int:
    if not paths:
        print("usage: python -m qwenfit.bench.refit measurements/RECORD.json ...", file=sys.stderr)
        return 2
    steps = [step for path in paths for step in steps_of(json.loads(Path(path).read_text(encoding="utf-8")))]
    constants = fit(steps)
    for name, value in constants.items():
        print(f"{name:12} {value:.3g}")
    for step in steps:
        planned = 1 / predicted(step, constants)
        print(
            f"{step.what:55} {1 / step.seconds:8.1f} steps/s, fitted {planned:8.1f} ({planned * step.seconds - 1:+.1%})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
