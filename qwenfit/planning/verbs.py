"""What `qwenfit plan` does with its options: one plan, everything that fits, or a reverse question."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from qwenfit.errors import DoesNotFit, UsageError
from qwenfit.hardware import Device, find_device
from qwenfit.planning.planner import (
    FINETUNE_FIELDS,
    INFERENCE_FIELDS,
    check_host_factor,
    make_hardware,
    make_task,
    plan,
    this_device,
)
from qwenfit.planning.render import fits_matrix, hardware_name, plan_text, plans_table, size, what_task
from qwenfit.planning.search import (
    best_fit,
    best_precision,
    biggest_batch,
    cards_that_fit,
    longest_sample,
    most_context,
    what_fits,
)
from qwenfit.planning.task import Finetune, check_count
from qwenfit.planning.types import Plan

Echo = Callable[[str], None]
INSTEAD = {"gpu": "a smaller model; qwenfit plan shows what fits", "precision": "--find gpu"}  # what else to ask
FITS, DOES_NOT = 0, DoesNotFit.exit_code


def chosen_device(gpu: str | None, measure: bool, gpus: int = 1) -> Device:
    """The device an option names ("cpu": this machine's), with its bandwidth measured where asked."""
    from qwenfit.detect import cpu_host, measure_bandwidth
    from qwenfit.hardware import with_bandwidth

    if gpu is None:
        device = this_device(check_count("gpus", gpus))
    else:
        device = cpu_host() if gpu.lower() == "cpu" else find_device(gpu)
    if measure:
        if not (device.detected and device.kind == "cpu"):
            raise UsageError(
                "Only this machine's CPU bandwidth can be measured by a plan.", "qwenfit bench decode MODEL"
            )
        device = with_bandwidth(device, measure_bandwidth())
    return device


def _plan(model: str, options: dict[str, Any], advise: bool = True) -> Plan:
    options = dict(options)
    device = chosen_device(options.pop("gpu"), options.pop("measure_bandwidth"), options["gpus"])
    return plan(model, options.pop("task"), gpu=device, advise=advise, **options)


def plan_one(model: str, options: dict[str, Any], form: str, colour: bool, echo: Echo) -> int:
    """Prints one plan; returns 0, or 3 when it does not fit."""
    made = _plan(model, options)
    if form == "json":
        _echo_json(made.to_dict(), echo)
    elif form == "text":
        echo(plan_text(made, colour))
    else:
        echo(plans_table([made], form))
    return FITS if made.fits else DOES_NOT


def plan_everything(options: dict[str, Any], form: str, colour: bool, echo: Echo) -> int:
    """Prints the table of every dense Qwen in every precision on this hardware, and the best that fits."""
    options = dict(options)
    device = chosen_device(options.pop("gpu"), options.pop("measure_bandwidth"), options["gpus"])
    sizes = {key: options[key] for key in (*INFERENCE_FIELDS, *FINETUNE_FIELDS)}
    task = make_task(options["task"], options["context"], sizes)
    hardware = make_hardware(device, options["gpus"], options["nodes"], options["network_gbps"])
    host_factor = check_host_factor(options["host_factor"])
    plans = what_fits(hardware, task, options["stack"], options["precision"], options["parallel"], host_factor)
    plans.sort(key=lambda p: (-p.model.parameters, p.model.name))
    fitting = [p for p in plans if p.fits]
    if form == "json":
        _echo_json([p.to_dict() for p in plans], echo)
        return FITS if fitting else DOES_NOT
    echo(plans_table(fitting, form) if form == "csv" else fits_matrix(plans, form))
    if form == "text":
        echo(
            f"\n{len(fitting)} of {len(plans)} pairs of model and precision fit {hardware_name(plans[0])} "
            f"({size(device.usable_bytes)} each), {what_task(plans[0].task)}."
        )
        if (best := best_fit(plans)) is not None:
            echo("\nThe largest that fits:\n")
            echo(plan_text(replace(best, advice=()), colour))
    return FITS if fitting else DOES_NOT


def answer(model: str, find: str, options: dict[str, Any], form: str, echo: Echo) -> int:
    """Answers a reverse question: the most context, batch or sample length here, or the cards or precision that fit."""
    made = _plan(model, options, advise=False)
    if find == "gpu":
        plans = cards_that_fit(made)
        if not plans:
            return _no_answer(find, f"{made.model.name} does not fit up to 8 of any catalog card.", form, echo)
        if form == "json":
            names = [hardware_name(p) for p in plans]
            _echo_json({"find": find, "answer": names, "plans": [p.to_dict() for p in plans]}, echo)
        else:
            echo(plans_table(plans, form, prices=True))
        return FITS
    where = made.hardware.device.name
    if find == "precision":
        best = best_precision(made)
        if best is None:
            return _no_answer(find, f"{made.model.name} fits {where} in no precision for this task.", form, echo)
        return _show_answer(best, "precision", best.precision, form, echo)
    largest = _largest(made, find)
    if not largest:
        return _no_answer(
            find, f"{made.model.name} in {made.precision} does not fit {where} at any {find}.", form, echo
        )
    return _show_answer(_at(made, find, largest), find, largest, form, echo)


def _largest(made: Plan, find: str) -> int:
    if find == "batch":
        return biggest_batch(made)
    if find == "seq-len" or isinstance(made.task, Finetune):
        return longest_sample(made)
    return most_context(made)


def _at(made: Plan, find: str, value: int) -> Plan:
    from qwenfit.planning.search import replan

    task = made.task
    if isinstance(task, Finetune):
        longer = replace(task, micro_batch=value) if find == "batch" else replace(task, seq_len=value)
        return replan(made, task=longer)
    if find == "batch":
        return replan(made, task=replace(task, batch=value))
    generate = min(task.generate, value - 1) or 1
    return replan(made, task=replace(task, prompt=max(1, value - generate), generate=generate, shared_prefix=0))


def _echo_json(value: Any, echo: Echo) -> None:
    echo(json.dumps(value, indent=2, ensure_ascii=False))


def _no_answer(find: str, sentence: str, form: str, echo: Echo) -> int:
    if form == "json":
        _echo_json({"find": find, "answer": None, "why": sentence}, echo)
    else:
        echo(sentence)
        echo(f"  try: {INSTEAD.get(find, '--find precision, or --find gpu')}")
    return DOES_NOT


def _show_answer(found: Plan, find: str, value: int | str, form: str, echo: Echo) -> int:
    if form == "json":
        _echo_json({"find": find, "answer": value, "plan": found.to_dict()}, echo)
        return FITS
    if form != "text":
        echo(plans_table([found], form))
        return FITS
    number = f"{value:,}" if isinstance(value, int) else value
    echo(f"{find}: {number}\n")
    echo(plan_text(found))
    return FITS
