"""What `qwenfit bench` does with its options: choose sizes, run, print, record, and hold to a tolerance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwenfit.bench.record import Record, figures_table, write_record
from qwenfit.bench.run import Sizes, bench
from qwenfit.errors import BeyondTolerance, UsageError
from qwenfit.planning.task import check_count

GUIDE_MODELS = ("Qwen-72B", "Qwen-14B", "Qwen-7B", "Qwen-1.8B")
DEMO_SECONDS = 120
DEMO_TOKENS = 32
LOAD_BYTES_PER_S = 0.3e9  # making random weights on a slow CPU


def run_bench(
    kind: str,
    model: str | None,
    make_options: Callable[..., Any],
    echo: Callable[[str], None],
    *,
    prompt: int | None,
    generate: int | None,
    batch: int,
    repeat: int,
    tolerance: float | None,
    record: Path,
    no_record: bool,
    as_json: bool,
    real_weights: bool,
    **given: Any,
) -> int:
    """Runs one benchmark; returns 0. Raises BeyondTolerance when a planned figure is off by more than `tolerance`."""
    check_count("batch", batch)
    check_count("repeat", repeat)
    options = {"context": None, "force": False, "random_weights": not real_weights} | given
    if kind == "demo":
        model, options["precision"] = demo_model(options["device"])
        kind, prompt, generate, repeat = "decode", 1, DEMO_TOKENS, 1
        if not as_json:
            echo(f"The largest guide model that fits and finishes in time: {model} in {options['precision']}.")
    if model is None:
        raise UsageError("Which model?", f"qwenfit bench {kind} Qwen-1.8B --precision int4")
    if kind == "decode":
        sizes = Sizes(prompt or 1, generate or 128, batch, repeat)
    else:
        sizes = Sizes(prompt or 512, generate or 1, batch, repeat)
    made = bench(kind, make_options(model=model, **options), sizes)
    _print(made, as_json, echo)
    if not no_record:
        path = write_record(made, record)
        if not as_json:
            echo(f"record: {path}")
    if tolerance is not None:
        _hold(made, tolerance)
    return 0


def _print(made: Record, as_json: bool, echo: Callable[[str], None]) -> None:
    if as_json:
        echo(json.dumps(made.to_dict(), indent=2, ensure_ascii=False))
    else:
        echo(figures_table([made]))


def _hold(made: Record, tolerance: float) -> None:
    for figure in made.figures:
        if figure.error is not None and abs(figure.error) > tolerance:
            raise BeyondTolerance(
                f"{figure.name} was planned at {figure.planned:.4g} {figure.unit}, measured at {figure.measured:.4g}: "
                f"{100 * figure.error:+.1f} %, beyond {100 * tolerance:.0f} %."
            )


def demo_model(device: str | None) -> tuple[str, str]:
    """The largest guide model, in its finest precision, that fits here and is loaded and measured in 2 minutes."""
    from qwenfit.planning.planner import plan
    from qwenfit.run.planned import run_device

    here = run_device(device)
    for name in GUIDE_MODELS:
        for precision in ("bf16", "int8", "int4"):
            made = plan(name, gpu=here, precision=precision, prompt=1, generate=DEMO_TOKENS, advise=False)
            load = made.memory.weights / LOAD_BYTES_PER_S if here.kind == "cpu" else made.memory.weights / 4e9
            seconds = load + 2 * DEMO_TOKENS / made.speed.interval.low
            if made.fits and seconds < DEMO_SECONDS:
                return name, precision
    raise UsageError("No model of the guide fits this machine and finishes in two minutes.", "qwenfit plan")
