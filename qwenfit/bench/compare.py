"""`qwenfit compare`: plan, measurement and other engines on the same prompts in one run, each in its turn."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenfit.bench.cost import measured_limits
from qwenfit.bench.peers import Answers, Peer, find_peers
from qwenfit.bench.profile import Sizes
from qwenfit.bench.record import Figure, Record, check_folder, make_record, write_record
from qwenfit.bench.run import Timed, engine_facts, memory_figures, plan_for, random_prompts, timed_answers
from qwenfit.planning.task import check_count
from qwenfit.planning.types import Plan

if TYPE_CHECKING:
    from qwenfit.run.planned import RunOptions

SPEEDS = ("prompt_tokens_per_s", "decode_tokens_per_s", "generated_tokens_per_s")


@dataclass(frozen=True)
class Comparison:
    """The record of our own run, what each peer reached by figure, and why some are missing."""

    record: Record
    peers: dict[str, dict[str, float]]
    notes: list[str]


def run_compare(
    model: str,
    make_options: Callable[..., Any],
    echo: Callable[[str], None],
    *,
    prompt: int,
    generate: int,
    batch: int,
    rounds: int,
    random_weights: bool | None,
    record: Path,
    no_record: bool,
    as_json: bool,
    **given: Any,
) -> int:
    """Compares, prints, records; returns 0."""
    check_count("prompt", prompt)
    check_count("generate", generate, least=2)
    check_count("batch", batch)
    check_count("rounds", rounds)
    if not no_record:
        check_folder(record)
    given |= {"random_weights": not Path(model).exists() if random_weights is None else random_weights}
    defaults = {"context": None, "force": False}
    made = compare(make_options(model=model, **defaults, **given), Sizes(prompt, generate, batch, rounds))
    echo(json.dumps(made.record.to_dict(), indent=2, ensure_ascii=False) if as_json else comparison_table(made))
    if not no_record:
        path = write_record(made.record, record)
        if not as_json:
            echo(f"record: {path}")
    return 0


def compare(options: RunOptions, sizes: Sizes, limits: Any = None) -> Comparison:
    """Load once; then `sizes.repeat` rounds in which qwenfit and each peer answer the same prompts in turn: medians."""
    from qwenfit.run.planned import load_planned, plan_run

    options = replace(options, context=sizes.prompt + sizes.generate, batch=sizes.batch)
    device = "cpu" if plan_run(options).hardware.device.kind == "cpu" else "cuda"
    limits = limits or measured_limits(device)
    llm, made = load_planned(options)
    made = plan_for(made, sizes, limits.read if device == "cpu" else None)
    timed_answers(llm, random_prompts(llm.engine.vocab_size, sizes.prompt, sizes.batch, 0), sizes.generate)
    memory = memory_figures(llm, made)  # before a peer has taken any
    peers, notes = find_peers(llm, options.model, sizes.batch)
    everyone = [Peer("qwenfit", "", lambda prompts, tokens: timed_answers(llm, prompts, tokens)), *peers]
    times: dict[str, list[Timed]] = {peer.name: [] for peer in everyone}
    same = dict.fromkeys(times, 1.0)
    for seed in range(sizes.repeat + 1):  # the first round warms up
        prompts = random_prompts(llm.engine.vocab_size, sizes.prompt, sizes.batch, seed + 1)
        answers = {peer.name: peer.run(prompts, sizes.generate) for peer in everyone}
        for name, (timed, ids) in answers.items():
            if seed:
                times[name].append(timed)
                same[name] = min(same[name], agreement(answers["qwenfit"][1], ids))
    reached = {name: _medians(rounds, sizes) for name, rounds in times.items()}
    ours = reached.pop("qwenfit")
    figures = [Figure(name, "tokens/s", planned, ours[name]) for name, planned in _planned(made, sizes).items()]
    facts: dict[str, Any] = {"prompt": sizes.prompt, "generate": sizes.generate, "batch": sizes.batch}
    facts |= {"rounds": sizes.repeat, "limits": asdict(limits)} | engine_facts(llm)
    facts["peers"] = {
        peer.name: {
            "weights": peer.what,
            "measured": reached[peer.name],
            "ratio": {name: ours[name] / value for name, value in reached[peer.name].items()},
            "same_greedy_tokens": same[peer.name],
        }
        for peer in peers
    }
    facts["notes"] = notes
    return Comparison(make_record("compare", made, figures + memory, facts), reached, notes)


def _planned(made: Plan, sizes: Sizes) -> dict[str, float | None]:
    """The plan's prompt speed is of one prompt alone."""
    planned: dict[str, float | None] = {
        "prompt_tokens_per_s": made.speed.prompt_tokens_per_s if sizes.batch == 1 else None,
        "decode_tokens_per_s": made.speed.tokens_per_s_per_request,
    }
    return planned | ({"generated_tokens_per_s": made.speed.tokens_per_s} if sizes.batch > 1 else {})


def _medians(rounds: list[Timed], sizes: Sizes) -> dict[str, float]:
    found = {
        "prompt_tokens_per_s": sizes.batch * sizes.prompt / statistics.median(timed.first for timed in rounds),
        "decode_tokens_per_s": statistics.median(timed.decode for timed in rounds),
    }
    if sizes.batch > 1:
        found["generated_tokens_per_s"] = statistics.median(timed.total for timed in rounds)
    return found


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of tokens up to the first that differs, over all answers."""
    equal = 0
    for mine, other in zip(ours, theirs, strict=True):
        for a, b in zip(mine, other, strict=True):
            if a != b:
                break
            equal += 1
    return equal / sum(map(len, ours))


def comparison_table(made: Comparison) -> str:
    """Plan, measurement and error, then each peer and how many times faster qwenfit is."""
    names = list(made.peers)
    head = ["figure", "plan", "qwenfit", "error"]
    for name in names:
        head += [name, "ratio"]
    rows = [head]
    for figure in made.record.figures:
        error = "-" if figure.error is None else f"{100 * figure.error:+.1f} %"
        planned = "-" if figure.planned is None else _number(figure.planned)
        row = [f"{figure.name.replace('_', ' ')} [{figure.unit}]", planned, _number(figure.measured), error]
        for name in names:
            value = made.peers[name].get(figure.name)
            row += ["-", "-"] if value is None else [_number(value), f"{figure.measured / value:.2f} x"]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    for name, peer in made.record.facts["peers"].items():
        lines.append(f"{name}: {peer['weights']}; {peer['same_greedy_tokens']:.0%} of the greedy tokens the same")
    title = f"{made.record.model} {made.record.precision} on {made.record.device}"
    return "\n".join([title, *lines, *made.notes])


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


__all__ = ["Answers", "Comparison", "agreement", "compare", "comparison_table", "run_compare"]
