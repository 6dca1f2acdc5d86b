"""docs/measured.md from the record of `qwenfit bench guide`: a pure function of the record, so the page can be checked.

`python -m qwenfit.bench.guide_page docs/measured.md` writes the page from the newest record in measurements/; with
--check it exits 1 when the page is not what that record gives.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwenfit.bench.guide_rows import BY_BATCH, BY_LENGTH, INFERENCE
from qwenfit.errors import BadFile

GIB = 2**30
REPOSITORY = Path(__file__).resolve().parents[2]
SPEED_TOLERANCE, MEMORY_TOLERANCE = 0.10, 0.02
Cells = list[str]


def guide_page(record: dict[str, Any], name: str) -> str:
    """The page; `name` is the record's file name in measurements/."""
    rows = record["rows"]
    parts = [
        "# The guide's inference tables, run",
        f"Generated from measurements/{name} by `python -m qwenfit.bench.guide_page docs/measured.md`; do not edit it. "
        "`make fresh` fails when page and record disagree.",
        _setting(record),
        summary(rows),
        "## Inference: 2,048 tokens from a 1-token prompt, one request",
        _table(_INFERENCE, [row for row in rows if row["table"] == INFERENCE]),
        "## KV cache by batch: 1,024 tokens for each request",
        _table(_CACHE, [row for row in rows if row["table"] == BY_BATCH]),
        "## KV cache by length: one request",
        _table(_CACHE, [row for row in rows if row["table"] == BY_LENGTH]),
        _meaning(record),
    ]
    return "\n\n".join(parts) + "\n"


def _setting(record: dict[str, Any]) -> str:
    limits, versions = record["limits"], ", ".join(f"{k} {v}" for k, v in record["versions"].items())
    return "\n".join(
        [
            f"- {record['hardware']}, {record['memory_bytes'] / GIB:.1f} GiB; {record['date']}; {versions}",
            f"- measured just before: {limits['read'] / 1e12:.2f} TB/s of a plain read, {limits['bf16'] / 1e12:.0f} "
            "TFLOP/s of a bf16 product",
            f"- `{record['command']}`, {record['seconds']:.0f} s in all, with making the random weights",
        ]
    )


def summary(rows: list[dict[str, Any]]) -> str:
    """How many rows ran, and how far the plan was off."""
    measured = [row for row in rows if row["measured"]]
    speed = _errors(measured, "tokens_per_s")
    lines = [
        f"{len(measured)} of {len(rows)} rows ran. Plan / measured - 1:",
        "",
        _within("tokens/s", speed, SPEED_TOLERANCE),
        _within("memory, allocated", _errors(measured, "allocated"), MEMORY_TOLERANCE),
        _within("memory, process", _errors(measured, "process"), MEMORY_TOLERANCE),
    ]
    gone = [row for row in rows if row["guide"]["gib"] is None and row["measured"]]
    if gone:
        ran = ", ".join(f"{row['kv_cache']} cache x {row['batch']}" for row in gone)
        lines.append(f"- rows that ran out of memory in the guide, and ran here: {ran}")
    return "\n".join(lines)


def _errors(rows: list[dict[str, Any]], figure: str) -> list[float]:
    return [row["plan"][figure] / row["measured"][figure] - 1 for row in rows]


def _within(what: str, errors: list[float], tolerance: float) -> str:
    if not errors:
        return f"- {what}: nothing measured"
    inside = sum(abs(error) <= tolerance for error in errors)
    worst = max(errors, key=abs)
    return f"- {what}: {inside} of {len(errors)} within {tolerance:.0%}, worst {worst:+.1%}"


def _table(columns: list[tuple[str, Callable[[dict[str, Any]], str]]], rows: list[dict[str, Any]]) -> str:
    lines = [[head for head, _ in columns], ["---"] * len(columns)]
    lines += [[cell(row) for _, cell in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _model(row: dict[str, Any]) -> str:
    return f"{row['model'].removeprefix('Qwen-')} {row['precision']}"


def _what(row: dict[str, Any]) -> str:
    return f"{row['kv_cache']}, {row['batch']} x {row['tokens']}"


def _guide_memory(row: dict[str, Any]) -> str:
    return "OOM" if row["guide"]["gib"] is None else f"{row['guide']['gib']:g}"


def _guide_speed(row: dict[str, Any]) -> str:
    return f"{row['guide']['tokens_per_s']:g}"


def _planned(figure: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: _number(row["plan"][figure], figure)


def _measured(figure: str) -> Callable[[dict[str, Any]], str]:
    def cell(row: dict[str, Any]) -> str:
        if row["measured"] is None:
            return str(row["why"]).rstrip(".") if figure == "tokens_per_s" else "-"
        return _number(row["measured"][figure], figure)

    return cell


def _error(figure: str) -> Callable[[dict[str, Any]], str]:
    def cell(row: dict[str, Any]) -> str:
        if row["measured"] is None:
            return ""
        return f"{100 * (row['plan'][figure] / row['measured'][figure] - 1):+.1f} %"

    return cell


def _number(value: float, figure: str) -> str:
    return f"{value:,.1f}" if figure == "tokens_per_s" else f"{value / GIB:.2f}"


def _rest(row: dict[str, Any]) -> str:
    """GiB allocated that are neither weights nor cache."""
    measured = row["measured"]
    if measured is None:
        return "-"
    return f"{(measured['allocated'] - measured['weights'] - measured['kv_cache']) / GIB:.2f}"


def _share(row: dict[str, Any]) -> str:
    return "-" if row["measured"] is None else f"{row['measured']['read_share']:.0%}"


def _generated(row: dict[str, Any]) -> str:
    if row["measured"] is None:
        return "-"
    generated = row["measured"]["generated"]
    return "all" if generated == row["tokens"] else f"{generated:,} of {row['tokens']:,}"


_SPEED = [
    ("tokens/s plan", _planned("tokens_per_s")),
    ("measured", _measured("tokens_per_s")),
    ("error", _error("tokens_per_s")),
    ("of the read", _share),
    ("generated", _generated),
]
_MEMORY = [
    ("GiB guide", _guide_memory),
    ("allocated plan", _planned("allocated")),
    ("measured", _measured("allocated")),
    ("error", _error("allocated")),
    ("unaccounted", _rest),
    ("process plan", _planned("process")),
    ("measured", _measured("process")),
    ("error", _error("process")),
]
_BOUND = [("planned bound", lambda row: str(row["plan"]["bound"]))]
_INFERENCE = [("model", _model), ("tokens/s guide", _guide_speed), *_SPEED, *_BOUND, *_MEMORY]
_CACHE = [("cache, requests x tokens", _what), *_MEMORY, *_SPEED, *_BOUND]


def _meaning(record: dict[str, Any]) -> str:
    cut = record["seconds_per_row"]
    limit = (
        "Every run goes to its last token."
        if cut is None
        else f"A run whose plan is longer than {cut:g} s is cut to the tokens that fit into them; `generated` says "
        "how many. Its tokens/s and its plan are of those. Its cache is allocated for all of them. Runs of batch 100 "
        "are never cut."
    )
    return f"""## What the figures are

- Guide: Qwen-1 remote code, AutoGPTQ, on A100-SXM4-80GB; memory is torch's allocated peak (of 7B and 14B in the first \
table: encoding 2,048 tokens instead). Here: qwenfit's engine, random weights of the same shapes, greedy, one card.
- tokens/s are those of all requests together over the whole of generate(), as the guide counts; the first run, which \
compiles kernels and records graphs, does not count. {limit}
- allocated is the peak of torch's allocator, cache and graphs included; process is what the driver shows as used, \
with the CUDA context; unaccounted is what is allocated beyond weights and cache.
- of the read: bytes that the steps must read (weights but the embedding table, mean cache) per second, over what a \
plain read reached just before."""


def load_record(path: Path) -> dict[str, Any]:
    """A record of `qwenfit bench guide`; BadFile when it is something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadFile(f"The record {path} cannot be read: {error}.") from error
    if not isinstance(record, dict) or record.get("kind") != "guide":
        raise BadFile(f"{path} is no record of the guide's rows.", "qwenfit bench guide")
    return record


def newest_record(folder: Path) -> Path | None:
    """The record of the guide's rows with the latest date in `folder`; None when there is none."""
    found = [(load_record(path)["date"], path) for path in sorted(folder.glob("guide-*.json"))]
    return max(found)[1] if found else None


def page_is_fresh(page: Path, folder: Path) -> bool:
    """Whether the page is what the newest record gives; without a record there must be no page."""
    newest = newest_record(folder)
    if newest is None:
        return not page.exists()
    return page.is_file() and page.read_text(encoding="utf-8") == guide_page(load_record(newest), newest.name)


def main(arguments: Sequence[str], folder: Path = REPOSITORY / "measurements") -> int:
    """`[--check] PATH`: writes the page, or checks it. Returns the exit code."""
    paths = [Path(argument) for argument in arguments if argument != "--check"]
    if len(paths) != 1 or paths[0].suffix != ".md":
        print("usage: python -m qwenfit.bench.guide_page [--check] docs/measured.md", file=sys.stderr)
        return 2
    (page,) = paths
    if "--check" in arguments:
        if page_is_fresh(page, folder):
            return 0
        print(f"{page} is stale: python -m qwenfit.bench.guide_page {page}", file=sys.stderr)
        return 1
    newest = newest_record(folder)
    if newest is None:
        print(f"{folder} has no record of the guide's rows: qwenfit bench guide", file=sys.stderr)
        return 4
    page.write_text(guide_page(load_record(newest), newest.name), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
