"""The record of a run: hardware, versions, command, date, plan, measurement and error, one JSON file each."""

from __future__ import annotations

import datetime
import errno
import importlib.metadata
import json
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qwenfit import __version__
from qwenfit.errors import NotFound
from qwenfit.planning.types import Plan

PACKAGES = ("torch", "triton", "transformers", "safetensors", "tokenizers", "gguf")


@dataclass(frozen=True)
class Figure:
    """One quantity, planned and measured, in `unit`."""

    name: str
    unit: str
    planned: float | None
    measured: float

    @property
    def error(self) -> float | None:
        """(planned - measured) / measured."""
        return None if self.planned is None or not self.measured else self.planned / self.measured - 1


@dataclass(frozen=True)
class Record:
    """What was run, on what, and every figure of it."""

    kind: str  # "decode" | "prefill" | ...
    model: str
    precision: str
    device: str
    command: str
    plan: dict[str, Any]
    figures: tuple[Figure, ...]
    facts: dict[str, Any] = field(default_factory=dict)  # threads, kernels, repetitions, ...
    date: str = ""
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        figures = {f.name: asdict(f) | {"error": f.error} for f in self.figures}
        return (
            {"schema": 1}
            | {k: v for k, v in asdict(self).items() if k != "figures"}
            | {
                "measured": {f.name: f.measured for f in self.figures},
                "figures": figures,
            }
        )


def make_record(kind: str, plan: Plan, figures: list[Figure], facts: dict[str, Any]) -> Record:
    """A record of a run that followed `plan`, stamped with now, the versions and the command line."""
    return Record(
        kind=kind,
        model=plan.model.name,
        precision=plan.precision,
        device=plan.hardware.device.name,
        command=" ".join(["qwenfit", *sys.argv[1:]]),
        plan=plan.to_dict(),
        figures=tuple(figures),
        facts=facts,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Of qwenfit, Python and the packages that matter, where installed."""
    found = {"qwenfit": __version__, "python": platform.python_version(), "system": platform.platform(terse=True)}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def check_folder(folder: Path) -> None:
    """Raise NotFound, before anything is measured, when no record can be written to `folder`."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        code = errno.EACCES if there.is_dir() else errno.ENOTDIR
        raise _unwritable(folder, OSError(code, os.strerror(code)))


def _unwritable(folder: Path, error: OSError) -> NotFound:
    return NotFound(f"A record cannot be written to {folder}: {error.strerror}.", "--record FOLDER, or --no-record")


def write_record(record: Record, folder: Path) -> Path:
    """Write the record as KIND-DEVICE-MODEL-PRECISION-DATE.json; NotFound when the folder cannot be written."""
    words = (record.kind, record.device, record.model, record.precision, record.date[:19])
    name = re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words)).strip("-").lower() + ".json"
    path = folder / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record.to_dict(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise _unwritable(folder, error) from error
    return path


def figures_table(records: list[Record]) -> str:
    """Records as aligned text: every figure planned, measured, and the error."""
    rows = [("model", "test", "figure", "planned", "measured", "error")]
    for record in records:
        for figure in record.figures:
            planned = "-" if figure.planned is None else _number(figure.planned)
            error = "-" if figure.error is None else f"{100 * figure.error:+.1f} %"
            what = f"{figure.name.replace('_', ' ')} [{figure.unit}]"
            rows.append(
                (f"{record.model} {record.precision}", record.kind, what, planned, _number(figure.measured), error)
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
