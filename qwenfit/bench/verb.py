"""What `qwenfit bench` does with its options: choose sizes, run, print, record, and hold to a tolerance."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwenfit.bench.perplexity import bench_perplexity
from qwenfit.bench.profile import KernelUse, Sizes, profile_table
from qwenfit.bench.record import Record, check_folder, figures_table, write_record
from qwenfit.bench.run import bench
from qwenfit.errors import BeyondTolerance, UsageError
from qwenfit.planning.task import check_count

GUIDE_MODELS = ("Qwen-72B", "Qwen-14B", "Qwen-7B", "Qwen-1.8B")
WINDOW = 2048  # tokens that see each other in a perplexity
DEMO_SECONDS = 90  # of the two minutes: the rest is for a machine that is busy
DEMO_TOKENS = 32
NONE = "No profile: answers of fewer than 8 tokens have no step that stands for them."
LOAD_BYTES_PER_S = 0.3e9  # making random weights on a slow CPU
ON_GPU = {  # what plan and measurement may differ by on a GPU, where nobody says otherwise
    "decode_tokens_per_s": 0.10,
    "generated_tokens_per_s": 0.10,
    "weights": 0.02,
    "kv_cache": 0.02,
    "allocated": 0.02,
    "process": 0.02,
}


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
    text: Path | None,
    tokens: int,
    profile: bool = False,
    **given: Any,
) -> int:
    """Runs one benchmark; returns 0. Raises BeyondTolerance when a planned figure is off by more than `tolerance`.

    Without a tolerance a GPU's figures are held to ON_GPU, a CPU's to nothing: others may be using it.
    """
    if profile and kind not in ("decode", "prefill", "demo"):
        raise UsageError(f"There is no profile of {kind}.", "qwenfit bench decode MODEL --profile")
    check_count("batch", batch)
    check_count("repeat", repeat)
    for name, count in (("prompt", prompt), ("generate", generate)):
        if count is not None:
            check_count(name, count)
    if tolerance is not None and not tolerance >= 0:
        raise UsageError(f"tolerance is a share from 0 up, not {tolerance:g}.", "--tolerance 0.1")
    if not no_record:
        check_folder(record)
    options = {"context": None, "force": False} | given
    if kind == "demo":
        if model is not None or given.get("precision") is not None:
            raise UsageError("demo picks the model and its precision itself.", "qwenfit bench decode MODEL")
        model, options["precision"] = demo_model(options["device"])
        kind, prompt, generate, repeat = "decode", 1, DEMO_TOKENS, 1
        if not as_json:
            echo(f"The largest guide model that fits and finishes in time: {model} in {options['precision']}.")
    if model is None:
        raise UsageError("Which model?", f"qwenfit bench {kind} Qwen-1.8B --precision int4")
    uses: list[KernelUse] = []
    if kind == "perplexity":
        made = _perplexity(make_options, model, options, text, prompt or WINDOW, tokens)
    else:
        sizes = Sizes(
            prompt or (1 if kind == "decode" else 512), generate or (128 if kind == "decode" else 1), batch, repeat
        )
        made, uses = bench(kind, make_options(model=model, **options), sizes, profile)
    _print(made, as_json, echo)
    if profile and not as_json:
        echo("\n" + (profile_table(uses, "one decode step" if kind == "decode" else "the prompts") if uses else NONE))
    if not no_record:
        path = write_record(made, record)
        if not as_json:
            echo(f"record: {path}")
    _hold(made, tolerance)
    return 0


def _perplexity(
    make_options: Callable[..., Any], model: str, options: dict[str, Any], text: Path | None, window: int, tokens: int
) -> Record:
    if text is None:
        raise UsageError("Perplexity of which text?", f"qwenfit bench perplexity {model} --text FILE")
    check_count("prompt", window, least=2)
    check_count("tokens", tokens, least=2)
    return bench_perplexity(make_options(model=model, **options | {"random_weights": False}), text, window, tokens)


def _print(made: Record, as_json: bool, echo: Callable[[str], None]) -> None:
    if as_json:
        echo(json.dumps(made.to_dict(), indent=2, ensure_ascii=False))
    else:
        echo(figures_table([made]))


def _hold(made: Record, tolerance: float | None) -> None:
    on_gpu = made.facts["device"].startswith("cuda")
    for figure in made.figures:
        most = tolerance if tolerance is not None else ON_GPU.get(figure.name) if on_gpu else None
        if most is not None and figure.error is not None and abs(figure.error) > most:
            raise BeyondTolerance(
                f"{figure.name} was planned at {figure.planned:.4g} {figure.unit}, measured at {figure.measured:.4g}: "
                f"{100 * figure.error:+.1f} %, beyond {100 * most:g} %.",
                "repeat it while nothing else runs, or allow more with --tolerance",
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
