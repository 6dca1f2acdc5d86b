"""Records of real runs as rows: what was planned beside what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenfit.errors import BadFile
from qwenfit.planning.constants import GIB


@dataclass(frozen=True)
class MeasuredFigure:
    """One figure of one record, in GiB for memory, else in the unit its name says."""

    record: str
    figure: str
    plan: float
    measured: float

    @property
    def error(self) -> float | None:
        return self.plan / self.measured - 1 if self.measured else None


def measurement_rows(folder: Path) -> list[MeasuredFigure]:
    """The memory and speed figures that both `plan` and `measured` of each `*.json` in `folder` have, in order.

    Records without both keys are of other things and left out. Raises BadFile for a file that is no JSON object.
    """
    rows: list[MeasuredFigure] = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadFile(f"The measurement {path} is no JSON: {error}.") from error
        if not isinstance(record, dict):
            raise BadFile(f"The measurement {path} is no JSON object.")
        if "plan" in record and "measured" in record:
            rows += _rows(path.stem, record["plan"], record["measured"])
    return rows


def _rows(name: str, plan: Any, measured: Any) -> Iterator[MeasuredFigure]:
    planned, found = dict(_numbers("", plan)), dict(_numbers("", measured))
    for figure, value in planned.items():
        if figure in found and figure.startswith(("memory.", "speed.")):
            in_gib = figure.startswith("memory.")
            unit = GIB if in_gib else 1
            yield MeasuredFigure(name, f"{figure}, GiB" if in_gib else figure, value / unit, found[figure] / unit)


def _numbers(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    """Every number of nested objects under its dotted name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield prefix, float(value)
