"""Plan beside record for training on a GPU: `python -m qwenfit.bench.refit_tune measurements/tune-*.json`.

Each record of `qwenfit bench tune` is planned again by the constants of planning/finetune_qwenfit.py as they are now,
and, where times depend on them, by those that fit all records best. Prints these, and run by run what both predict;
they belong into FITTED there. Constants of which the records tell nothing stay as they are.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenfit.planning.finetune_qwenfit import FITTED
from qwenfit.planning.planner import plan
from qwenfit.planning.task import Finetune
from qwenfit.planning.types import Plan

FREE = (
    "train_product_share",
    "train_attention_share",
    "train_short_attention_share",
    "train_host",
    "train_host_adapters",
    "train_host_packed",
)
STEPS = (1.2, 1.05, 1.01)  # factors tried on each constant, the coarse ones first
STRAY = 0.005  # relative: what a constant's distance by a factor e from its present value costs, beside the errors


@dataclass(frozen=True)
class Cell:
    """A measured cell of the finetuning table: seconds per iteration, and gigabytes allocated at the peak."""

    model: str
    card: str
    precision: str
    task: Finetune
    seconds: float
    allocated: float

    def planned(self) -> Plan:
        return plan(self.model, self.task, gpu=self.card, precision=self.precision)

    def planned_seconds(self) -> float:
        speed = self.planned().speed
        assert speed is not None and speed.seconds_per_iter is not None
        return speed.seconds_per_iter

    def __str__(self) -> str:
        return f"{self.model} {self.task.method} {self.precision} {self.task.seq_len}"


def cell_of(record: dict[str, Any]) -> Cell:
    """Of a record of `qwenfit bench tune` on a GPU."""
    ran = record["facts"]["cell"]
    task = Finetune(
        method=ran["method"],
        seq_len=ran["seq_len"],
        micro_batch=ran["micro_batch"],
        grad_accum=ran["grad_accum"],
        optimizer=ran["optimizer"],
        lora_rank=record["plan"]["task"]["lora_rank"],
        checkpointing=ran["keep"] != "all",
    )
    measured = record["measured"]
    return Cell(
        record["model"], record["device"], record["precision"], task, measured["seconds_per_iter"],
        measured["allocated"],
    )  # fmt: skip


def fit(cells: Sequence[Cell]) -> dict[str, float]:
    """The constants FREE with the least squares of relative errors of time, found by steps; FITTED is left alone."""
    kept = {name: FITTED[name] for name in FREE}

    def loss() -> float:
        errors = [math.log(cell.planned_seconds() / cell.seconds) for cell in cells]
        strays = [STRAY * math.log(FITTED[name].value / kept[name].value) for name in FREE]
        return sum(e * e for e in (*errors, *strays))

    best = loss()
    try:
        for step in STEPS:
            improved = True
            while improved:
                improved = False
                for name in FREE:
                    for factor in (step, 1 / step):
                        before = FITTED[name]
                        FITTED[name] = replace(before, value=before.value * factor)
                        now = math.inf if name.endswith("share") and FITTED[name].value > 1 else loss()
                        if now < best:
                            best, improved = now, True
                        else:
                            FITTED[name] = before
        return {name: FITTED[name].value for name in FREE}
    finally:
        FITTED.update(kept)


def table(cells: Sequence[Cell], constants: dict[str, float]) -> list[str]:
    """A line a cell: measured seconds and gigabytes, and how far the plan is off, as it is and as fitted."""
    kept = {name: FITTED[name] for name in constants}
    now = [cell.planned_seconds() for cell in cells]
    try:
        FITTED.update({name: replace(FITTED[name], value=value) for name, value in constants.items()})
        fitted = [cell.planned_seconds() for cell in cells]
    finally:
        FITTED.update(kept)
    lines = []
    for cell, one, two in zip(cells, now, fitted, strict=True):
        allocated = cell.planned().memory.allocated / 1e9
        lines.append(
            f"{cell!s:28} {cell.seconds:7.3f} s, planned {one:7.3f} ({one / cell.seconds - 1:+6.1%}), "
            f"fitted {two:7.3f} ({two / cell.seconds - 1:+6.1%});  {cell.allocated:6.2f} GB, planned {allocated:6.2f} "
            f"({allocated / cell.allocated - 1:+.1%})"
        )
    return lines


def main(paths: Sequence[str]) -> int:
    if not paths:
        print("usage: python -m qwenfit.bench.refit_tune measurements/tune-*.json ...", file=sys.stderr)
        return 2
    records = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    cells = [cell_of(record) for record in records if record["kind"] == "tune" and record["facts"]["device"] == "cuda"]
    constants = fit(cells)
    for name, value in constants.items():
        print(f"{name:28} {FITTED[name].value:9.3g} now, fitted {value:9.3g} {FITTED[name].unit}")
    print("\n".join(table(cells, constants)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
