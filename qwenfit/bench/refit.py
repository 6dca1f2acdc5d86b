"""The constants of a decode step on a GPU, fitted to records: `python -m qwenfit.bench.refit measurements/X.json ...`.

A step takes (bytes of each kind) / (share x plain read) + layers x gap + what the host adds. The gap and the host's
time are those of all records, the shares those of a card: where a faster memory does not bring its share, the card's
arithmetic is the limit, in bytes/s, and the plan takes the smaller of both. Least squares on relative errors; all are
at least 0, and no share is above 1. Prints the values that belong into MEASURED of planning/constants.py and, run by
run, what they predict.
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

ROUNDS = 5_000
COMMON = ("layer_gap", "step_host")


@dataclass(frozen=True)
class Step:
    """One measured decode step: seconds by unknown at a share of 1 (or its count), and the seconds it took."""

    what: str
    card: str
    terms: dict[str, float]  # by kind of READ_KINDS, and by COMMON
    seconds: float


def steps_of(record: dict[str, Any]) -> Iterator[Step]:
    """The steps of a record of bench/gpu_decode.py (no host in it) or of `qwenfit bench guide` (the whole engine)."""
    if record["kind"] == "gpu decode":
        for run in record["runs"]:
            mean = run["context"] + run["tokens"] / 2
            task = Inference(max(1, int(mean) - 1), 2, run["batch"], kv_cache=run["kv_cache"])
            if not _told_by_shares(run):
                continue
            yield _step(record["hardware"], run["model"], run["precision"], task, run["ms_per_step"] / 1e3, host=0)
    else:
        for row in record["rows"]:
            if row["measured"] is not None and _told_by_shares(row):
                task = Inference(1, row["measured"]["generated"], row["batch"], kv_cache=row["kv_cache"])
                seconds = row["batch"] / row["measured"]["tokens_per_s"]
                yield _step(record["hardware"], row["model"], row["precision"], task, seconds, host=1)


def _told_by_shares(run: dict[str, Any]) -> bool:
    """Whether shares of the memory's speed tell the step's time: of few requests, or one with int4 or int8 weights."""
    return run["batch"] == 1 or (run["batch"] <= 16 and run["precision"] not in get_stack("qwenfit").rows_limits)


def _step(card: str, model: str, precision: str, task: Inference, seconds: float, host: int) -> Step:
    device = find_device(card)
    stack, config = get_stack("qwenfit"), get_model(model)
    reads = step_reads(config, Hardware(device), task, precision, stack)
    rate = read_bandwidth(device, stack)
    terms = {kind: reads[kind] / rate for kind in READ_KINDS if reads[kind]}
    what = f"{model} {precision}, {task.kv_cache} cache, {task.batch} x {task.prompt} + {task.generate}"
    counts = {"layer_gap": float(config.num_layers), "step_host": float(host)}
    return Step(what, device.name, terms | {name: count for name, count in counts.items() if count}, seconds)


def unknown(step: Step, name: str) -> str:
    """What a term of the step is fitted by: "int4 H100-SXM5-80GB", or one of COMMON."""
    return name if name in COMMON else f"{name} {step.card}"


def fit(steps: Sequence[Step]) -> dict[str, float]:
    """Non-negative least squares on relative errors, by coordinate descent. Shares by kind and card; gap, host in s."""
    names = list(dict.fromkeys(unknown(step, name) for step in steps for name in step.terms))
    x = {name: {"layer_gap": 1e-5, "step_host": 1e-4}.get(name, 1.2) for name in names}  # of shares 1 / x
    rows = [{unknown(step, name): term / step.seconds for name, term in step.terms.items()} for step in steps]
    left = [1 - sum(a * x[name] for name, a in row.items()) for row in rows]
    inside = {name: [i for i, row in enumerate(rows) if name in row] for name in names}
    squares = {name: sum(rows[i][name] ** 2 for i in inside[name]) for name in names}
    for _ in range(ROUNDS):
        for name in names:
            step = sum(rows[i][name] * left[i] for i in inside[name]) / squares[name]
            new = max(0.0 if name in COMMON else 1.0, x[name] + step)  # nothing reads faster than a plain read
            for i in inside[name]:
                left[i] -= rows[i][name] * (new - x[name])
            x[name] = new
    return {name: value if name in COMMON else 1 / value for name, value in x.items()}


def predicted(step: Step, constants: dict[str, float]) -> float:
    """Seconds of the step by these constants."""
    found = ((constants[unknown(step, name)], name, term) for name, term in step.terms.items())
    return sum(term * value if name in COMMON else term / value for value, name, term in found)


def main(paths: Sequence[str]) -> int:
    if not paths:
        print("usage: python -m qwenfit.bench.refit measurements/RECORD.json ...", file=sys.stderr)
        return 2
    try:
        records = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    except OSError as failure:
        print(f"cannot read {failure.filename}: {failure.strerror}", file=sys.stderr)
        return 2
    steps = [step for record in records for step in steps_of(record)]
    constants = fit(steps)
    for name, value in sorted(constants.items()):
        kind, _, card = name.partition(" ")
        rate = f", {value * read_bandwidth(find_device(card), get_stack('qwenfit')) / 1e12:.2f} TB/s" if card else ""
        print(f"{kind:12} {card:16} {value:.3g}{rate}")
    for step in steps:
        planned = 1 / predicted(step, constants)
        error = planned * step.seconds - 1
        what = f"{step.card[:4]} {step.what:55}"
        print(f"{what} {1 / step.seconds:8.1f} steps/s, fitted {planned:8.1f} ({error:+.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
