"""Reverse questions: the most context, the biggest batch, the longest sample, the cheapest card, what fits here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from qwenfit.catalog import dense_model_names, get_model
from qwenfit.config import ModelConfig
from qwenfit.errors import UsageError
from qwenfit.hardware import Device, Hardware, all_devices, cost_key
from qwenfit.planning.checks import check_context
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
    plan: Plan,
    *,
    task: Task | None = None,
    precision: str | None = None,
    hardware: Hardware | None = None,
    stack: str | None = None,
) -> Plan:
    """The same plan with another task, precision, hardware or stack; no advice. UsageError as from plan()."""
    task, precision = task or plan.task, precision or plan.precision
    if hardware is not None:
        precision = choose_precision(plan.model, task, hardware.device, precision)
    return build_plan(
        plan.model,
        hardware or plan.hardware,
        task,
        precision,
        get_stack(stack or plan.stack),
        plan.asked_parallel if stack is None else None,
        plan.host_factor,
        plan.spec,
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
        for count in (1,) if device.kind in ("cpu", "unified") else GPU_COUNTS:
            candidate = try_replan(plan, hardware=replace(plan.hardware, device=device, gpus=count, nodes=1))
            if candidate is not None and candidate.fits:
                found.append(candidate)
                break
    return sorted(found, key=_cost)


def _cost(plan: Plan) -> tuple[bool, float, float]:
    unknown, price, other = cost_key(plan.hardware.device)
    return (unknown, price * plan.hardware.gpus, other)


def try_replan(
    plan: Plan,
    *,
    task: Task | None = None,
    precision: str | None = None,
    hardware: Hardware | None = None,
    stack: str | None = None,
) -> Plan | None:
    """As `replan`, or None where that cannot be: too many cards for its layers, a cut through a group, ..."""
    try:
        return replan(plan, task=task, precision=precision, hardware=hardware, stack=stack)
    except UsageError:
        return None


def best_precision(plan: Plan) -> Plan | None:
    """The plan in the finest precision that fits, or None."""
    for precision in precisions_of(plan.task):
        candidate = try_replan(plan, precision=sixteen_bit(plan.hardware.device) if precision == "bf16" else precision)
        if candidate is not None and candidate.fits:
            return candidate
    return None


def precisions_of(task: Task) -> tuple[str, ...]:
    """The precisions a task can be done in, finest first."""
    if isinstance(task, Inference):
        return ("bf16", "int8", "int4")
    return ("int8", "int4") if task.method == "qlora" else ("bf16",)


def sixteen_bit(device: Device) -> str:
    """bf16, or fp16 on an accelerator without it."""
    return "bf16" if device.bf16 or device.kind == "cpu" else "fp16"


def what_fits(
    hardware: Hardware,
    task: Task,
    stack: str = "qwenfit",
    precision: str | None = None,
    parallel: str | None = None,
    host_factor: float = 1.0,
) -> list[Plan]:
    """Every catalog model in every precision (or one) for a task on this hardware; those that do not fit too.

    Left out are models that are not made for so much context or cannot be split over so many devices; where that
    leaves none, the last one's UsageError is raised.
    """
    the_stack, plans, refusal = get_stack(stack), [], None
    for name in dense_model_names():
        config: ModelConfig = get_model(name)
        for wanted in (precision,) if precision else precisions_of(task):
            chosen = choose_precision(config, task, hardware.device, wanted)
            try:
                check_context(config, task)
                plans.append(build_plan(config, hardware, task, chosen, the_stack, parallel, host_factor))
            except UsageError as error:
                refusal = error
    if refusal is not None and not plans:
        raise refusal
    return plans


def best_fit(plans: list[Plan]) -> Plan | None:
    """The plan to recommend: the most parameters that fit, then the finest precision."""
    fine = {"bf16": 2, "fp16": 2, "int8": 1, "int4": 0}
    fitting = [p for p in plans if p.fits]
    return max(fitting, key=lambda p: (p.model.parameters, fine.get(p.precision, 2)), default=None)
