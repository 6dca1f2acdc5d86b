"""Advice, each with its reason and its own figures: what would make a plan fit, and what would make it better.

The reasons are those of the guide's "Optimization recommendations" and of what is known of each stack. Every figure
comes from a plan of the changed settings, which `Advice.changes` names, so that anyone can ask for that plan.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from qwenfit.catalog import read_csv
from qwenfit.guide.cards import NamedCards, named_cards
from qwenfit.hardware import Hardware
from qwenfit.planning.search import (
    biggest_batch,
    cards_that_fit,
    longest_sample,
    most_context,
    sixteen_bit,
    try_replan,
)
from qwenfit.planning.stack import get_stack
from qwenfit.planning.task import Finetune, Inference
from qwenfit.planning.types import DOES_NOT_FIT, FITS, HOST, LINK, TIGHT, Advice, Plan
from qwenfit.planning.weights import BITS

# What rounding costs, for the choice of a precision: MMLU of Qwen-7B-Chat (official README).
QUALITY = {"bf16": 55.8, "int8": 55.4, "int4": 55.1}
FLASH = (
    "it takes less memory and time on Ampere and newer, the more the longer the context (the guide: 40 % for batches); "
    "the official code uses it where it is installed"
)
LONG = 4096  # tokens: from here on the guide advises an int8 KV cache


def advice_for(plan: Plan) -> tuple[Advice, ...]:
    """What to change when it does not fit (each alternative planned, and only those that fit), else what to improve."""
    if plan.verdict == DOES_NOT_FIT:
        return (*_ways_to_fit(plan), *_guide_cards(plan))
    if isinstance(plan.task, Inference):
        return (*_faster_inference(plan, plan.task), *_guide_cards(plan))
    return tuple(_better_finetuning(plan, plan.task))


def changes(plan: Plan, other: Plan) -> dict[str, Any]:
    """The arguments of plan() in which `other` differs from `plan`."""
    old, new = _arguments(plan), _arguments(other)
    found = {key: value for key, value in new.items() if old.get(key) != value}
    if isinstance(other.task, Inference) and {"prompt", "generate"} & set(found):
        found |= {"prompt": other.task.prompt, "generate": other.task.generate, "context": other.task.context}
    return found


def _arguments(plan: Plan) -> dict[str, Any]:
    sizes = asdict(plan.task)
    sizes.pop("method", None)
    hardware = plan.hardware
    return sizes | {
        "task": plan.task.name,
        "precision": plan.precision,
        "stack": plan.stack,
        "gpu": hardware.device.name,
        "gpus": hardware.gpus,
        "nodes": hardware.nodes,
        "parallel": plan.asked_parallel,
    }


def _advise(found: list[Advice], what: str, why: str, plan: Plan, other: Plan | None) -> bool:
    """Appends the advice to plan `other` instead, if that can be and fits; says whether it did."""
    if other is None or not other.fits:
        return False
    found.append(Advice(what, why, changes(plan, other), other.memory.process, other.speed.tokens_per_s))
    return True


def _guide_cards(plan: Plan) -> list[Advice]:
    """The guide's minimum and recommended cards, as far as they hold the plan, for the four models it speaks of."""
    if not isinstance(plan.task, Inference) or plan.model.architecture != "qwen1":
        return []
    rows = [row for row in read_csv("guide/requirements.csv") if row["model"] == plan.model.name]
    precision = "bf16" if BITS[plan.precision] == 16 else plan.precision
    least = next((row["minimum_gpu"] for row in rows if row["precision"] == precision), None)
    if least is None:
        return []
    recommended = named_cards(next(row["recommended_gpu"] for row in rows if row["recommended_gpu"]))
    best = _any_of([card.text for card in recommended if _holds(card, plan)])
    every = "--find gpu ranks every card of the catalog"
    if _holds(named_cards(least)[0], plan):
        what = f"take at least {least}" + (f"; recommended is {best}" if best else "")
        return [Advice(what, f"what the guide names for this model and precision; {every}")]
    if not best:
        return []
    return [
        Advice(f"take {best}", f"the guide recommends it; {least}, the least it names, does not hold this; {every}")
    ]


def _any_of(names: list[str]) -> str:
    """a, b or c"""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _holds(cards: NamedCards, plan: Plan) -> bool:
    other = try_replan(plan, hardware=Hardware(cards.device, cards.count))
    return other is not None and other.fits


def _ways_to_fit(plan: Plan) -> list[Advice]:
    task = plan.task
    found = _inference_ways(plan, task) if isinstance(task, Inference) else _finetune_ways(plan, task)
    found += _more_hardware(plan)
    if not found:
        found.append(
            Advice(f"use a smaller model than {plan.model.name}", "no setting and no catalog card of up to 8 holds it")
        )
    return found


def _inference_ways(plan: Plan, task: Inference) -> list[Advice]:
    found: list[Advice] = []
    int8_cache = replace(task, kv_cache="int8")
    if task.kv_cache != "int8":
        _advise(found, "quantize the KV cache to int8", "it halves the cache", plan, try_replan(plan, task=int8_cache))
    for precision in ("int8", "int4"):
        if BITS[precision] >= BITS[plan.precision]:
            continue
        share = BITS[precision] / BITS[plan.precision]
        why = (
            f"the layers' weights take {share:.2g} of the bytes; embedding and head stay 16-bit; {_quality(precision)}"
        )
        if _advise(found, f"use {precision} weights", why, plan, try_replan(plan, precision=precision)):
            continue
        if task.kv_cache != "int8":
            what = f"use {precision} weights and an int8 KV cache"
            _advise(found, what, why, plan, try_replan(plan, task=int8_cache, precision=precision))
    if (context := most_context(plan)) > 1:
        answer = min(task.generate, context - 1)
        less = replace(task, prompt=context - answer, generate=answer, shared_prefix=0)
        what = f"use a context of {context:,} tokens"
        _advise(found, what, "the cache shrinks with it", plan, try_replan(plan, task=less))
    if task.batch > 1 and (batch := biggest_batch(plan)):
        fewer = try_replan(plan, task=replace(task, batch=batch))
        _advise(found, f"run {batch:,} requests at once", "each has its own cache", plan, fewer)
    return found


def _finetune_ways(plan: Plan, task: Finetune) -> list[Advice]:
    found: list[Advice] = []
    if not task.checkpointing:
        why = "activations are recomputed: less memory for about a third more time"
        other = try_replan(plan, task=replace(task, checkpointing=True))
        _advise(found, "turn gradient checkpointing on", why, plan, other)
    if plan.hardware.world_size > 1 and plan.parallel != "zero3":
        why = "it shards the weights too; it needs a fast link, since all of them cross it in every pass"
        _advise(found, "use ZeRO-3", why, plan, try_replan(plan, task=replace(task, zero=3)))
    if not (get_stack(plan.stack).fused_loss or task.fused_loss):
        why = "the logits of the sample are never held as a whole"
        _advise(found, "fuse the loss", why, plan, try_replan(plan, task=replace(task, fused_loss=True)))
    if task.method in ("full", "lora-emb"):
        why = "gradients and optimizer are for adapters only"
        other = try_replan(plan, task=replace(task, method="lora"))
        _advise(found, "train LoRA adapters instead", why, plan, other)
    if task.method != "qlora":
        why = "the base weights are int4; it is slower at short lengths and merges onto the 16-bit base only"
        zero = None if task.zero == 3 else task.zero
        other = try_replan(plan, task=replace(task, method="qlora", zero=zero), precision="int4")
        _advise(found, "train with Q-LoRA", why, plan, other)
    for optimizer, why in (("bf16", "weights, gradients and moments in bf16"), ("8bit", "8-bit moments")):
        if task.optimizer == "fp32":
            other = try_replan(plan, task=replace(task, optimizer=optimizer))
            _advise(found, f"use the {optimizer} optimizer regime", why, plan, other)
    if (length := longest_sample(plan)) > 0:
        why = "logits and activations shrink with it"
        other = try_replan(plan, task=replace(task, seq_len=length))
        _advise(found, f"train on {length:,} tokens a sample", why, plan, other)
    if task.micro_batch > 1 and (size := biggest_batch(plan)):
        other = try_replan(plan, task=replace(task, micro_batch=size))
        _advise(found, f"use micro-batches of {size}", "accumulate more steps instead", plan, other)
    return found


def _more_hardware(plan: Plan) -> list[Advice]:
    found: list[Advice] = []
    device = plan.hardware.device
    if device.kind not in ("cpu", "unified"):
        for gpus in (2, 4, 8):
            if gpus <= plan.hardware.gpus:
                continue
            more = try_replan(plan, hardware=replace(plan.hardware, gpus=gpus))
            why = f"each holds a part ({more.parallel})" if more else ""
            if _advise(found, f"use {gpus} x {device.name}", why, plan, more):
                break
    cards = cards_that_fit(plan)
    fewest = min((p.hardware.gpus for p in cards), default=0)
    best = next((p for p in cards if p.hardware.gpus == fewest), None)
    if best is not None:
        name = best.hardware.device.name
        what = f"use one {name}" if fewest == 1 else f"use {fewest} x {name}"
        kind = "single card" if fewest == 1 else f"set of {fewest}, the fewest that will do,"
        first = "smallest" if best.hardware.device.price_usd is None else "cheapest"
        _advise(found, what, f"the {first} {kind} of the catalog that holds it", plan, best)
    return found


def _faster_inference(plan: Plan, task: Inference) -> list[Advice]:
    found: list[Advice] = []
    pace = plan.speed.tokens_per_s
    if plan.speed.bound == HOST:
        why = "this software is bound by the host that launches its kernels, not by the card: CUDA graphs remove that"
        _advise(found, "use the qwenfit stack", why, plan, try_replan(plan, stack="qwenfit"))
    if plan.stack == "transformers-4.3x" and plan.hardware.device.flash_attention == 2 and task.kv_cache != "int8":
        why = FLASH
        if task.flash_attention is False:
            other = try_replan(plan, task=replace(task, flash_attention=True))
            _advise(found, "install FlashAttention 2 (pip install flash-attn)", why, plan, other)
        else:
            why += ", and this plan counts on it"
            found.append(Advice("install FlashAttention 2 (pip install flash-attn)", why))
    if plan.precision in ("bf16", "fp16"):
        other = try_replan(plan, precision="int4")
        if other and other.speed.tokens_per_s > 1.2 * pace:
            why = f"decoding is a matter of bytes read; {_quality('int4')}"
            _advise(found, "use int4 weights for speed", why, plan, other)
        if plan.verdict == TIGHT:
            why = f"a balance of memory and quality where 16 bits leave no room; {_quality('int8')}"
            _advise(found, "use int8 weights", why, plan, try_replan(plan, precision="int8"))
    elif plan.precision in ("int8", "int4") and plan.model.quantization is None:
        found += _finer_weights(plan)
    pool = get_stack(plan.stack).utilization is not None  # then the cache is what is left, whatever is needed
    worth = 0.05 if task.context >= LONG or plan.verdict == TIGHT else 0.25
    if not pool and task.kv_cache != "int8" and plan.memory.kv_cache > worth * plan.memory.allocated:
        why = (
            "int8 halves it, so that batch or context can double; the guide advises it for 4,096 tokens and more, for "
            "batches, and where memory is short"
        )
        other = try_replan(plan, task=replace(task, kv_cache="int8"))
        _advise(found, "quantize the KV cache to int8", why, plan, other)
    alone = task.batch > 1 and not get_stack(plan.stack).paged  # software that takes requests as they are
    if plan.stack != "vllm" and (plan.parallel == "layers" or alone):
        other = try_replan(plan, stack="vllm")
        if other and other.speed.tokens_per_s > 1.05 * pace:
            why = (
                "layers placed one after the other take turns; tensor parallelism lets the cards work together"
                if plan.parallel == "layers"
                else "it batches requests as they come, over a paged cache"
            )
            _advise(found, "use the vllm stack", why, plan, other)
    if task.batch > 1 and task.shared_prefix == 0 and task.prompt >= 256 and get_stack(plan.stack).paged:
        why = "requests that begin alike keep one copy of the common part in a paged cache"
        found.append(Advice("share the prefix (--shared-prefix)", why))
    return found


def _quality(precision: str) -> str:
    return f"Qwen-7B-Chat's MMLU goes from {QUALITY['bf16']} to {QUALITY[precision]} (official README)"


def _finer_weights(plan: Plan) -> list[Advice]:
    """The finest weights that fit with room to spare: quality, where memory is not short."""
    found: list[Advice] = []
    for precision in (sixteen_bit(plan.hardware.device), "int8"):
        other = try_replan(plan, precision=precision) if BITS[precision] > BITS[plan.precision] else None
        if other and other.verdict == FITS:
            why = f"they fit too, where quality counts before speed: in {plan.precision} {_quality(plan.precision)}"
            _advise(found, f"use {precision} weights for quality", why, plan, other)
            break
    return found


def _better_finetuning(plan: Plan, task: Finetune) -> list[Advice]:
    found: list[Advice] = []
    pace = plan.speed.tokens_per_s
    if plan.parallel == "zero3" and plan.hardware.nodes > 1:
        why = (
            "ZeRO-3 sends all weights over the network in every pass, ZeRO-2 only trained gradients: "
            "test the network first; the official README advises ZeRO-2 between nodes"
        )
        if not _advise(found, "use ZeRO-2 between nodes", why, plan, try_replan(plan, task=replace(task, zero=2))):
            found.append(Advice("keep ZeRO-3, with a fast network", f"ZeRO-2 does not fit. {why}"))
    elif plan.parallel == "zero3":
        other = try_replan(plan, task=replace(task, zero=2))
        if other and other.speed.tokens_per_s > 1.02 * pace:
            why = "it fits too, and the weights need not be gathered in every pass"
            _advise(found, "use ZeRO-2", why, plan, other)
    elif plan.hardware.nodes > 1:
        seconds = plan.speed.terms["link"]
        why = f"{seconds:.2g} s of each iteration are planned for it; qwenfit doctor --network measures it"
        found.append(Advice("test the network between the nodes first", why))
    if plan.speed.bound == LINK:
        more = try_replan(plan, task=replace(task, micro_batch=2 * task.micro_batch))
        why = "the link between the GPUs sets the pace: more work for each transfer, or a faster link"
        _advise(found, f"use micro-batches of {2 * task.micro_batch}", why, plan, more)
    if task.checkpointing:
        other = try_replan(plan, task=replace(task, checkpointing=False))
        if other and other.verdict == FITS and other.speed.tokens_per_s > 1.02 * pace:
            why = "the activations fit, so that nothing needs to be computed twice"
            _advise(found, "turn gradient checkpointing off", why, plan, other)
    if task.method == "qlora":
        other = try_replan(plan, task=replace(task, method="lora"), precision=sixteen_bit(plan.hardware.device))
        if other and other.speed.tokens_per_s > pace:
            why = "it fits too and is faster: no dequantization, and it merges onto the weights it was trained on"
            _advise(found, "use LoRA on the 16-bit model", why, plan, other)
    if plan.stack == "transformers-4.3x" and plan.hardware.device.flash_attention == 2:
        found.append(
            Advice("install FlashAttention 2 (pip install flash-attn)", f"{FLASH}, and this plan counts on it")
        )
    if task.method == "lora" and plan.stack == "transformers-4.3x":
        why = "a base model must learn the ChatML tokens: LoRA then trains embedding and head too (LoRA (emb))"
        other = try_replan(plan, task=replace(task, method="lora-emb"))
        _advise(found, "for a base model with chat data use --task lora-emb", why, plan, other)
    return found
