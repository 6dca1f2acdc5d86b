"""Records of real runs as rows: what was planned beside what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenfit.errors import BadFile


@dataclass(frozen=True)
class MeasuredFigure:
    """One figure of one record, in the unit its name says."""

    record: str
    figure: str
    plan: float
    measured: float

    @property
    def error(self) -> float | None:
        return self.plan / self.measured - 1 if self.measured else None


def measurement_rows(folder: Path) -> list[MeasuredFigure]:
    """Every figure that a record in `folder` has both planned and measured (bench.record writes them), in order.

    Records without such figures are of other things and left out. Raises BadFile for a file that is no JSON object.
    """
    rows: list[MeasuredFigure] = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadFile(f"The measurement {path} is no JSON: {error}.") from error
        if not isinstance(record, dict):
            raise BadFile(f"The measurement {path} is no JSON object.")
        rows += _rows(path.stem, record.get("figures"))
    return rows


def _rows(name: str, figures: Any) -> Iterator[MeasuredFigure]:
    for figure, values in figures.items() if isinstance(figures, dict) else ():
        planned, measured = values.get("planned"), values.get("measured")
        if planned is not None and measured is not None:
            yield MeasuredFigure(name, f"{figure.replace('_', ' ')}, {values['unit']}", planned, measured)
