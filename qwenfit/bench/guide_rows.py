"""What `qwenfit bench guide` runs: the guide's inference rows and its two KV cache tables, on one card."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qwenfit.catalog import read_csv
from qwenfit.guide.types import OOM

INFERENCE, BY_BATCH, BY_LENGTH = "inference", "kv_cache_batch", "kv_cache_length"
TOKENS = 2048  # that a row of the inference table generates, from one token


@dataclass(frozen=True)
class Run:
    """`batch` requests, each of one token that `tokens` more are generated from. Rows of equal runs share one."""

    model: str
    precision: str
    kv_cache: str
    batch: int
    tokens: int


@dataclass(frozen=True)
class Row:
    """A row of the guide and the run that it names. `gib`: torch's allocated peak; None where the guide ran out."""

    table: str
    run: Run
    gib: float | None
    tokens_per_s: float | None = None  # the KV cache tables give none
    whole: bool = False  # always to its last token, however long that takes


def guide_rows() -> list[Row]:
    """The twelve inference rows of transformers, then both KV cache tables, in the guide's order."""
    rows = [
        Row(
            INFERENCE,
            Run(row["model"], row["precision"], "bf16", 1, TOKENS),
            float(row["memory_gb"]),
            float(row["tokens_per_s"]),
        )
        for row in read_csv("guide/inference.csv")
        if row["stack"] == "transformers"
    ]
    return rows + _cache_rows(BY_BATCH) + _cache_rows(BY_LENGTH)


def _cache_rows(table: str) -> list[Row]:
    found = []
    for row in read_csv(f"guide/{table}.csv"):
        cache = "int8" if row["kv_cache_int8"] == "yes" else "bf16"
        run = Run(row["model"], row["precision"], cache, int(row["batch"]), int(row["generated_tokens"]))
        gib = None if row["memory_gb"] == OOM else float(row["memory_gb"])
        # The guide's largest batch is a claim about running at all: it is held to the last token.
        found.append(Row(table, run, gib, whole=table == BY_BATCH and run.batch == 100))
    return found


def grouped(rows: Iterable[Row]) -> dict[tuple[str, str], dict[Run, bool]]:
    """Runs by (model, precision), so that weights are made once; the value says whether a run must be whole.

    The model that most rows ask for comes first: if time runs out, the fewest rows are lost.
    """
    groups: dict[tuple[str, str], dict[Run, bool]] = {}
    for row in rows:
        runs = groups.setdefault((row.run.model, row.run.precision), {})
        runs[row.run] = runs.get(row.run, False) or row.whole
    return dict(sorted(groups.items(), key=lambda group: -len(group[1])))
