"""The guide's figures of inference as claims: memory, tokens/s, both KV cache tables, and the cards it names.

How they were measured (catalog/guide/README.md): memory is GiB of torch's allocated peak, summed over the cards.
That of 7B and 14B is of encoding 2048 tokens and generating one; everything else starts from one token. The KV cache
tables ran without FlashAttention.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwenfit.catalog import get_model, read_csv
from qwenfit.guide import bounds
from qwenfit.guide.cards import NamedCards
from qwenfit.guide.types import MEMORY, OOM, TOKENS_PER_S, Bound, Claim, Line
from qwenfit.hardware import Device, Hardware, find_device
from qwenfit.planning.constants import GIB
from qwenfit.planning.planner import build_plan
from qwenfit.planning.stack import get_stack
from qwenfit.planning.task import Inference
from qwenfit.planning.types import Plan

GUIDE_STACK = "transformers-4.3x"
GUIDE_CARD = "A100-SXM4-80GB"
ENCODING = ("Qwen-7B", "Qwen-14B")  # first published as "encoding 2048 tokens and generating one" (QwenLM/Qwen@235aa8f)
SPEED_TASK = Inference(prompt=1, generate=2048)


def memory_task(model: str) -> Inference:
    """What the inference memory of a model was measured on."""
    return Inference(prompt=2048, generate=1) if model in ENCODING else SPEED_TASK


def inference_claims() -> Iterator[Claim]:
    """Memory and tokens/s of inference.csv."""
    for row in read_csv("guide/inference.csv"):
        model, precision, gpus = row["model"], row["precision"], int(row["gpus"])
        stack = "vllm" if row["stack"] == "vllm" else GUIDE_STACK
        where = precision + (f", {gpus} GPUs" if gpus > 1 else "") + (", vLLM" if stack == "vllm" else "")
        if row["memory_gb"]:
            yield memory_claim("inference", model, where, precision, float(row["memory_gb"]), gpus)
        yield _speed_claim(model, where, precision, float(row["tokens_per_s"]), gpus, stack)


def memory_claim(table: str, model: str, where: str, precision: str, stated: float, gpus: int) -> Claim:
    """GiB over all cards, for one request of the length that the model's memory was measured on."""
    task = memory_task(model)
    plan = _plan(model, precision, task, GUIDE_STACK, find_device(GUIDE_CARD), gpus)
    return Claim(
        table=table,
        model=model,
        where=where,
        quantity=MEMORY,
        unit="GiB",
        stated=stated,
        predicted=_allocated_gib(plan),
        tested=stated,
        fits=plan.fits,
        bounds=(bounds.inference_least(plan.model, task, precision), bounds.card_capacity(plan.hardware, gpus, GIB)),
        same=f"{model} {precision} inference",
    )


def _speed_claim(model: str, where: str, precision: str, stated: float, gpus: int, stack: str) -> Claim:
    plan = _plan(model, precision, SPEED_TASK, stack, find_device(GUIDE_CARD), gpus)
    shards = gpus if plan.parallel == "tensor" else 1
    return Claim(
        table="inference",
        model=model,
        where=where,
        quantity=TOKENS_PER_S,
        unit=TOKENS_PER_S,
        stated=stated,
        predicted=plan.speed.tokens_per_s,
        tested=stated,
        fits=plan.fits,
        bounds=(bounds.decode_ceiling(plan.model, plan.hardware, SPEED_TASK, precision, shards),),
    )


def kv_cache_claims(by: str) -> Iterator[Claim]:
    """The KV cache table by "batch" or by "length"."""
    device, table = find_device(GUIDE_CARD), f"kv_cache_{by}"
    for row in read_csv(f"guide/{table}.csv"):
        model, precision, batch, tokens = (
            row["model"],
            row["precision"],
            int(row["batch"]),
            int(row["generated_tokens"]),
        )
        cache = "int8" if row["kv_cache_int8"] == "yes" else "bf16"
        task = Inference(prompt=1, generate=tokens, batch=batch, kv_cache=cache, flash_attention=False)
        plan = _plan(model, precision, task, GUIDE_STACK, device, 1)
        ran = row["memory_gb"] != OOM
        yield Claim(
            table=table,
            model=model,
            where=f"{cache} cache, batch {batch}, {tokens} tokens",
            quantity=MEMORY,
            unit="GiB",
            stated=float(row["memory_gb"]) if ran else OOM,
            predicted=_allocated_gib(plan),
            tested=float(row["memory_gb"]) if ran else None,
            fits=plan.fits,
            bounds=(bounds.inference_least(plan.model, task, precision), bounds.card_capacity(plan.hardware, 1, GIB)),
            line=Line(f"{table} {cache}", "batch" if by == "batch" else "tokens", convex=True),
            position=batch if by == "batch" else tokens,
            same=f"{model} {cache} cache {batch} x {tokens}",
        )


def card_claim(
    table: str, model: str, precision: str, quantity: str, cards: NamedCards, own_gib: float, stack: str = GUIDE_STACK
) -> Claim:
    """Do the named cards hold the model: by the guide's own figure, by the plan of its stack, and by qwenfit's."""
    task = memory_task(model)
    plan = _plan(model, precision, task, stack, cards.device, cards.count)
    ours = _plan(model, precision, task, "qwenfit", cards.device, cards.count)
    capacity = bounds.card_capacity(plan.hardware, cards.count, GIB)
    return Claim(
        table=table,
        model=model,
        where=precision + (", vLLM" if stack == "vllm" else ""),
        quantity=quantity,
        unit="GiB",
        stated=cards.text,
        predicted=f"{_needs(plan)} of {plan.capacity / GIB:.1f}; qwenfit {_needs(ours)}",
        tested=own_gib,
        fits=plan.fits,
        bounds=(Bound(f"the guide's own {own_gib:g} GiB is {capacity.law}", high=capacity.high),),
    )


def _needs(plan: Plan) -> str:
    return f"{plan.verdict} {plan.memory.process / GIB:.1f}"


def _plan(model: str, precision: str, task: Inference, stack: str, device: Device, gpus: int) -> Plan:
    return build_plan(get_model(model), Hardware(device, gpus), task, precision, get_stack(stack))


def _allocated_gib(plan: Plan) -> float:
    return sum(memory.allocated for memory in plan.memory_per_device) / GIB
