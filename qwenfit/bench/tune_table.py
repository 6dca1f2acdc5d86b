"""`qwenfit bench tune`: one cell of the guide's finetuning table, or a list of them as one table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwenfit.bench.record import Record, check_folder, figures_table, write_record
from qwenfit.bench.tune import Trainee, bench_cell, beyond, matmul_rate, with_defaults
from qwenfit.errors import DoesNotFit, UsageError
from qwenfit.run.planned import run_device
from qwenfit.tune.config import TuneConfig

TABLE = [  # model, method, length, optimizer
    *(("Qwen-7B", "lora", length, "fp32") for length in (256, 512, 1024, 2048, 4096, 8192)),
    *(("Qwen-7B", "qlora", length, "fp32") for length in (256, 1024, 4096)),
    ("Qwen-7B", "lora-emb", 1024, "fp32"),
    ("Qwen-1.8B", "lora", 1024, "fp32"),
    ("Qwen-1.8B", "full", 1024, "fp32"),
    ("Qwen-7B", "full", 1024, "bf16"),
]


def table_cells(device: str | None) -> list[TuneConfig]:
    """TABLE as settings: batch 1, accumulation 8, padded to the length, as the guide measured."""
    return [cell_settings(*cell, device=device) for cell in TABLE]


def cell_settings(model: str, method: str, seq_len: int, optimizer: str = "fp32", **more: Any) -> TuneConfig:
    return with_defaults(TuneConfig(model, method=method, seq_len=seq_len, optimizer=optimizer, **more))


def bench_tune(
    model: str | None,
    echo: Callable[[str], None],
    *,
    table: bool,
    peers: bool,
    steps: int,
    tolerance: float | None,
    record: Path,
    no_record: bool,
    as_json: bool,
    device: str | None,
    **given: Any,
) -> int:
    """Runs the cells, prints, records; returns 0. Raises BeyondTolerance after all is printed, DoesNotFit for one."""
    if table == (model is not None):
        raise UsageError("Name a model, or --table alone.", "qwenfit bench tune Qwen-7B --method lora --seq-len 1024")
    if not no_record:
        check_folder(record)
    given = {name: value for name, value in given.items() if value is not None}
    if model is not None:
        cells = [with_defaults(TuneConfig(model, device=device, **({"method": "lora"} | given)))]
    else:
        cells = [replace(cell, **given) for cell in table_cells(device)]
    records = run_cells(cells, steps, echo if not as_json else _silent, stop=not table)
    for made in records:
        if not no_record:
            path = write_record(made, record)
            if not as_json:
                echo(f"record: {path}")
    rivals = _peers(cells, steps) if peers else []
    if as_json:
        echo(json.dumps([made.to_dict() for made in records] + rivals, indent=2, ensure_ascii=False))
    else:
        echo(figures_table(records) if model is not None else cells_table(records))
        for rival in rivals:
            echo(rival_line(rival))
    if (error := beyond(records, tolerance)) is not None:
        raise error
    return 0


def run_cells(cells: list[TuneConfig], steps: int, echo: Callable[[str], None], stop: bool = True) -> list[Record]:
    """Each cell's record; neighbours of one model and method share its weights. `stop` at one that does not fit."""
    records: list[Record] = []
    trainee: Trainee | None = None
    rate: float | None = None
    for cell in cells:
        if rate is None:
            rate = matmul_rate("cpu" if run_device(cell.device).kind == "cpu" else "cuda", cell.precision)
            echo(f"a large product reaches {rate / 1e12:.4g} TFLOP/s here")
        try:
            made, trainee = bench_cell(cell, steps, trainee, rate)
        except DoesNotFit as error:
            if stop:
                raise
            echo(f"{cell.model} {cell.method} {cell.seq_len}: {error.message}")
            continue
        records.append(made)
        echo(cell_line(made))
    return records


HEADER = (
    "model      method    length   s plan  s meas  error   GB plan  GB meas  error   reserved  tokens/s  TFLOP/s  "
    "share  guide (A100)  peers (H100)"
)


def cells_table(records: list[Record]) -> str:
    """One line a cell: seconds per iteration and allocated gigabytes, planned and measured, and what others have."""
    return "\n".join([HEADER, *(cell_line(made) for made in records)])


def cell_line(made: Record) -> str:
    figure = {f.name: f for f in made.figures}
    seconds, allocated = figure["seconds_per_iter"], figure["allocated"]
    cell = made.facts["cell"]
    guide = made.facts["guide"]
    peers = "; ".join(f"{p['s_per_iter']:g} s {p['memory_gb']:g} G" for p in made.facts["peers"])
    beside = "-" if guide is None else f"{guide['s_per_iter']:g} s {guide['memory_gb']:g} G"
    return (
        f"{made.model:10} {cell['method']:9} {cell['seq_len']:6}  {seconds.planned or 0:7.3f} {seconds.measured:7.3f} "
        f"{100 * (seconds.error or 0):+6.1f}%  {allocated.planned or 0:7.2f}  {allocated.measured:7.2f} "
        f"{100 * (allocated.error or 0):+6.1f}%  {figure['reserved'].measured:8.2f}  "
        f"{figure['tokens_per_s'].measured:8,.0f}  {figure['flops'].measured:7.1f}  "
        f"{figure['product_share'].measured:5.0%}  {beside:12}  {peers or '-'}"
    )


def _peers(cells: list[TuneConfig], steps: int) -> list[dict[str, Any]]:
    from qwenfit.bench.tune_peers import bench_peers

    return [result for cell in cells for result in bench_peers(cell, steps)]


def rival_line(result: dict[str, Any]) -> str:
    return (
        f"{result['model']:10} {result['method']:9} {result['seq_len']:6}  {result['software']}: "
        f"{result['s_per_iter']:.3f} s, {result['memory_gb']:.2f} GB allocated"
    )


def _silent(text: str) -> None:
    """Where the output is JSON."""
