"""Reverse questions: the most context, the biggest batch, the longest sample, the cheapest card, what fits here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from qwenfit.catalog import dense_model_names, get_model
from qwenfit.config import ModelConfig
from qwenfit.errors import UsageError
from qwenfit.hardware import Device, Hardware, all_devices, cost_key
from qwenfit.planning.planner import build_plan, choose_precision
from qwenfit.planning.stack import get_stack
from qwenfit.planning.task import LARGEST, Finetune, Inference, Task
from qwenfit.planning.types import Plan

GPU_COUNTS = (1, 2, 4, 8)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n in 1..limit with fits(n), for a predicate that turns false once; 0 when even 1 does not."""
    if not fits(1):
        return 0
    low, high = 1, 1
    while high < limit and fits(min(high * 2, limit)):
        high = min(high * 2, limit)
        low = high
    high = min(high * 2, limit)
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low


def replan(
    plan: Plan, *, task: Task | None = None, precision: str | None = None, hardware: Hardware | None = None
) -> Plan:
    """The same plan with another task, precision or hardware; no advice."""
    return build_plan(
        plan.model,
        hardware or plan.hardware,
        task or plan.task,
        precision or plan.precision,
        get_stack(plan.stack),
        plan.parallel if plan.parallel == "tensor" and hardware is None else None,
        notes=plan.notes,
        spec=plan.spec,
    )


def most_context(plan: Plan) -> int:
    """The most tokens of prompt + answer that fit, up to the model's limit (inference)."""
    if not isinstance(plan.task, Inference):
        raise UsageError("The most context is a question about inference.")
    base = plan.task

    def fits(context: int) -> bool:
        answer = min(base.generate, context - 1) or 1
        prompt = max(1, context - answer)
        return replan(plan, task=replace(base, prompt=prompt, generate=answer, shared_prefix=0)).fits

    return largest(fits, plan.model.context_length)


def biggest_batch(plan: Plan) -> int:
    """The most requests at once (inference) or samples in a micro-batch (finetuning) that fit."""
    if isinstance(plan.task, Inference):
        inference = plan.task
        return largest(lambda n: replan(plan, task=replace(inference, batch=n)).fits, LARGEST)
    finetune = plan.task
    return largest(lambda n: replan(plan, task=replace(finetune, micro_batch=n)).fits, LARGEST)


def longest_sample(plan: Plan) -> int:
    """The longest training sequence that fits, up to the model's limit (finetuning)."""
    if not isinstance(plan.task, Finetune):
        raise UsageError("The longest training sequence is a question about finetuning.")
    base = plan.task
    return largest(lambda n: replan(plan, task=replace(base, seq_len=n)).fits, plan.model.context_length)


def cards_that_fit(plan: Plan, devices: Iterable[Device] | None = None) -> list[Plan]:
    """For every card of the catalog the plan with the fewest of them (1, 2, 4, 8) that fits, cheapest first."""
    found = []
    for device in sorted(devices or all_devices(), key=cost_key):
        for count in GPU_COUNTS:
            candidate = _try(plan, Hardware(device, count))
            if candidate is not None and candidate.fits:
                found.append(candidate)
                break
    return sorted(found, key=_cost)


def _cost(plan: Plan) -> tuple[bool, float, float]:
    unknown, price, other = cost_key(plan.hardware.device)
    return (unknown, price * plan.hardware.gpus, other)


def _try(plan: Plan, hardware: Hardware) -> Plan | None:
    try:
        precision, notes = choose_precision(plan.model, plan.task, hardware.device, plan.precision)
        return build_plan(
            plan.model, hardware, plan.task, precision, get_stack(plan.stack), notes=notes, spec=plan.spec
        )
    except UsageError:  # too many cards for its layers, or a card without a figure of its speed
        return None


def best_precision(plan: Plan) -> Plan | None:
    """The plan in the finest precision that fits, or None."""
    for precision in ("bf16", "int8", "int4"):
        if isinstance(plan.task, Finetune) and plan.task.method != "qlora" and precision != "bf16":
            return None
        wanted = "fp16" if precision == "bf16" and not _has_bf16(plan.hardware.device) else precision
        candidate = replan(plan, precision=wanted)
        if candidate.fits:
            return candidate
    return None


def _has_bf16(device: Device) -> bool:
    return device.bf16 or device.kind == "cpu"


def what_fits(device: Device, task: Task, stack: str = "qwenfit", gpus: int = 1) -> list[Plan]:
    """Every catalog model and precision for a task on this hardware, largest model first; those that do not fit too."""
    plans = []
    for name in dense_model_names():
        config: ModelConfig = get_model(name)
        for precision in ("bf16", "int8", "int4"):
            if isinstance(task, Finetune) and (precision == "bf16") == (task.method == "qlora"):
                continue
            chosen, notes = choose_precision(config, task, device, precision)
            limited = _within(config, task)
            try:
                plans.append(build_plan(config, Hardware(device, gpus), limited, chosen, get_stack(stack), notes=notes))
            except UsageError:
                continue
    return plans


def _within(config: ModelConfig, task: Task) -> Task:
    """The task, shortened to the model's context."""
    if isinstance(task, Inference):
        return replace(task, generate=min(task.generate, max(1, config.context_length - task.prompt)))
    return replace(task, seq_len=min(task.seq_len, config.context_length))


def best_fit(plans: list[Plan]) -> Plan | None:
    """The plan to recommend: the most parameters that fit, then the finest precision."""
    fine = {"bf16": 2, "fp16": 2, "int8": 1, "int4": 0}
    fitting = [p for p in plans if p.fits]
    return max(fitting, key=lambda p: (p.model.parameters, fine.get(p.precision, 2)), default=None)
