"""What `qwenfit bench guide` does with its options; `python -m qwenfit.bench.guide_verb` is the same without click."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from qwenfit.bench.guide_page import summary
from qwenfit.bench.guide_rows import guide_rows
from qwenfit.bench.guide_run import gpu_bench, run_and_write
from qwenfit.bench.record import check_folder
from qwenfit.errors import QwenfitError, UsageError

PAGE = Path("docs/measured.md")


def bench_guide(
    model: str | None,
    echo: Callable[[str], None],
    *,
    record: Path,
    out: Path | None = None,
    seconds_per_row: float | None = None,
    deadline: float | None = None,
) -> int:
    """Runs the rows, of one model or of all; returns 0, or 1 when a row that fits failed.

    Writes the page to `out` and the record to the folder `record`. A row of one model alone makes no page unless
    `out` is given: the page is of all.
    """
    for name, seconds in (("seconds-per-row", seconds_per_row), ("deadline", deadline)):
        if seconds is not None and not seconds > 0:
            raise UsageError(f"{name} is a number of seconds above 0, not {seconds:g}.")
    rows = guide_rows()
    if model is not None:
        known = dict.fromkeys(row.run.model for row in rows)
        rows = [row for row in rows if row.run.model == model]
        if not rows:
            raise UsageError(f"The guide has no inference rows of {model!r}.", f"It has {', '.join(known)}.")
    page = out if out is not None or model is not None else PAGE
    check_folder(record)
    if page is not None:
        check_folder(page.parent)
    made = run_and_write(
        gpu_bench(),
        rows,
        record,
        page,
        seconds_per_row=seconds_per_row,
        deadline=deadline,
        command=" ".join(["qwenfit", *sys.argv[1:]]),
        tell=echo,
    )
    failed = [row for row in made["rows"] if row["why"] is not None and row["why"].startswith("failed")]
    echo(f"{summary(made['rows'])}\n{made['seconds']:.0f} s; record in {record}" + (f", page {page}" if page else ""))
    return 1 if failed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--out", type=Path, help="the page")
    parser.add_argument("--record", type=Path, default=Path("measurements"), help="folder of the record")
    parser.add_argument("--seconds-per-row", type=float)
    parser.add_argument("--deadline", type=float)
    given = parser.parse_args()
    sys.argv = ["qwenfit", "bench", "guide", *sys.argv[1:]]  # the command that the record names
    try:
        return bench_guide(
            given.model,
            lambda text: print(text, flush=True),
            record=given.record,
            out=given.out,
            seconds_per_row=given.seconds_per_row,
            deadline=given.deadline,
        )
    except QwenfitError as error:
        print(f"error: {error.message}" + (f"\n  try: {error.hint}" if error.hint else ""), file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
