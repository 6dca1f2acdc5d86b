"""Advice, each with its reason and its own figures: what would make a plan fit, and what would make it better.

The reasons are those of the guide's "Optimization recommendations" and of what is known of each stack.
"""

from __future__ import annotations

from dataclasses import replace

from qwenfit.errors import UsageError
from qwenfit.hardware import Hardware
from qwenfit.planning.search import biggest_batch, cards_that_fit, longest_sample, most_context, replan
from qwenfit.planning.task import Finetune, Inference, Task
from qwenfit.planning.types import DOES_NOT_FIT, HOST, LINK, Advice, Plan
from qwenfit.planning.weights import BITS


def advice_for(plan: Plan, host_factor: float = 1.0) -> tuple[Advice, ...]:
    """What to change when it does not fit (each alternative planned, and only those that fit), else what to improve."""
    if plan.verdict == DOES_NOT_FIT:
        return tuple(_ways_to_fit(plan))
    return tuple(_improvements(plan))


def _advise(what: str, why: str, plan: Plan, **changes: object) -> Advice:
    return Advice(what, why, changes, plan.memory.process, plan.speed.tokens_per_s)


def _try(
    plan: Plan, task: Task | None = None, precision: str | None = None, hardware: Hardware | None = None
) -> Plan | None:
    try:
        candidate = replan(plan, task=task, precision=precision, hardware=hardware)
    except UsageError:
        return None
    return candidate if candidate.fits else None


def _ways_to_fit(plan: Plan) -> list[Advice]:
    found = _inference_ways(plan) if isinstance(plan.task, Inference) else _finetune_ways(plan)
    found += _more_hardware(plan)
    if not found:
        found.append(
            Advice(f"use a smaller model than {plan.model.name}", "no setting and no catalog card of up to 8 holds it")
        )
    return found


def _inference_ways(plan: Plan) -> list[Advice]:
    assert isinstance(plan.task, Inference)
    task, found = plan.task, []
    int8_cache = replace(task, kv_cache="int8")
    if task.kv_cache != "int8" and (fitting := _try(plan, int8_cache)):
        found.append(_advise("quantize the KV cache to int8", "it halves the cache", fitting, kv_cache="int8"))
    for precision in ("int8", "int4"):
        if BITS[precision] >= BITS[plan.precision]:
            continue
        why = f"weights take {BITS[precision] / BITS[plan.precision]:.2g} of the bytes; embedding and head stay 16-bit"
        if fitting := _try(plan, precision=precision):
            found.append(_advise(f"use {precision} weights", why, fitting, precision=precision))
        elif task.kv_cache != "int8" and (fitting := _try(plan, int8_cache, precision)):
            what = f"use {precision} weights and an int8 KV cache"
            found.append(_advise(what, why, fitting, precision=precision, kv_cache="int8"))
    if (context := most_context(plan)) > 1:
        answer = min(task.generate, context - 1)
        less = replace(task, prompt=context - answer, generate=answer, shared_prefix=0)
        if fitting := _try(plan, less):
            found.append(
                _advise(f"use a context of {context:,} tokens", "the cache shrinks with it", fitting, context=context)
            )
    if task.batch > 1 and (batch := biggest_batch(plan)):
        fewer = replan(plan, task=replace(task, batch=batch))
        found.append(_advise(f"run {batch:,} requests at once", "each has its own cache", fewer, batch=batch))
    return found


def _finetune_ways(plan: Plan) -> list[Advice]:
    assert isinstance(plan.task, Finetune)
    task, found = plan.task, []
    if not task.checkpointing and (fitting := _try(plan, replace(task, checkpointing=True))):
        found.append(
            _advise("turn gradient checkpointing on", "activations are recomputed", fitting, checkpointing=True)
        )
    if task.method in ("full", "lora-emb") and (fitting := _try(plan, replace(task, method="lora", optimizer="fp32"))):
        found.append(
            _advise(
                "train LoRA adapters instead", "gradients and optimizer are for adapters only", fitting, task="lora"
            )
        )
    if task.method != "qlora" and (fitting := _try(plan, replace(task, method="qlora", optimizer="fp32"), "int4")):
        why = "the base weights are int4; it is slower at short lengths and merges onto the 16-bit base only"
        found.append(_advise("train with Q-LoRA", why, fitting, task="qlora", precision="int4"))
    for optimizer, why in (("bf16", "weights, gradients and moments in bf16"), ("8bit", "8-bit moments")):
        if task.optimizer == "fp32" and (fitting := _try(plan, replace(task, optimizer=optimizer))):
            found.append(_advise(f"use the {optimizer} optimizer regime", why, fitting, optimizer=optimizer))
    if (length := longest_sample(plan)) > 0:
        shorter = replan(plan, task=replace(task, seq_len=length))
        found.append(
            _advise(
                f"train on {length:,} tokens a sample", "logits and activations shrink with it", shorter, seq_len=length
            )
        )
    if task.micro_batch > 1 and (size := biggest_batch(plan)):
        smaller = replan(plan, task=replace(task, micro_batch=size))
        found.append(
            _advise(f"use micro-batches of {size}", "accumulate more steps instead", smaller, micro_batch=size)
        )
    return found


def _more_hardware(plan: Plan) -> list[Advice]:
    found = []
    device = plan.hardware.device
    if device.kind != "cpu":
        for gpus in (2, 4, 8):
            if gpus <= plan.hardware.gpus:
                continue
            if fitting := _try(plan, hardware=replace(plan.hardware, gpus=gpus)):
                why = f"each holds a part ({fitting.parallel})"
                found.append(_advise(f"use {gpus} x {device.name}", why, fitting, gpus=gpus))
                break
    single = [p for p in cards_that_fit(plan) if p.hardware.gpus == 1]
    if single:
        best = single[0]
        why = "the cheapest single card of the catalog that holds it"
        found.append(_advise(f"use one {best.hardware.device.name}", why, best, gpu=best.hardware.device.name))
    return found


def _improvements(plan: Plan) -> list[Advice]:
    if isinstance(plan.task, Inference):
        return _faster_inference(plan, plan.task)
    return _better_finetuning(plan, plan.task)


def _faster_inference(plan: Plan, task: Inference) -> list[Advice]:
    found: list[Advice] = []
    if plan.speed.bound == HOST:
        why = "this software is bound by the host that launches its kernels, not by the card: CUDA graphs remove that"
        found.append(Advice("use the qwenfit or the vllm stack", why, {"stack": "qwenfit"}))
    if plan.precision in ("bf16", "fp16"):
        fitting = _try(plan, precision="int4")
        if fitting and fitting.speed.tokens_per_s > 1.2 * plan.speed.tokens_per_s:
            why = "decoding is a matter of bytes read; 7B's MMLU goes from 55.8 to 55.1 (official README)"
            found.append(_advise("use int4 weights for speed", why, fitting, precision="int4"))
    cache_share = plan.memory.kv_cache / max(1, plan.memory.allocated)
    if task.kv_cache != "int8" and cache_share > 0.25 and (fitting := _try(plan, replace(task, kv_cache="int8"))):
        why = "the cache is a large part of the memory; int8 halves it, so batch or context can double"
        found.append(_advise("quantize the KV cache to int8", why, fitting, kv_cache="int8"))
    if plan.parallel == "layers":
        why = "layers placed one after the other take turns; tensor parallelism lets the cards work together"
        found.append(Advice("use the vllm stack for several cards", why, {"stack": "vllm"}))
    if task.batch > 1 and task.shared_prefix == 0 and task.prompt >= 256 and plan.stack in ("qwenfit", "vllm"):
        why = "requests that begin alike keep one copy of the common part in a paged cache"
        found.append(Advice("share the prefix (--shared-prefix)", why, {}))
    return found


def _better_finetuning(plan: Plan, task: Finetune) -> list[Advice]:
    found: list[Advice] = []
    hardware = plan.hardware
    if plan.parallel == "zero3" and hardware.nodes > 1:
        why = (
            "ZeRO-3 sends all weights over the network twice per micro-batch, ZeRO-2 only trained gradients: "
            "test the link first (qwenfit doctor --network); the official README advises ZeRO-2 between nodes"
        )
        fitting = _try(plan, replace(task, zero=2))
        if fitting:
            found.append(_advise("use ZeRO-2 between nodes", why, fitting, zero=2))
        else:
            found.append(Advice("keep ZeRO-3, with a fast network", why, {}))
    elif plan.speed.bound == LINK:
        found.append(
            Advice("use a faster link or more gradient accumulation", "the link between the GPUs sets the pace", {})
        )
    if task.method == "qlora" and (fitting := _try(plan, replace(task, method="lora"), "bf16")):
        why = "it fits too and is faster: no dequantization, and the adapter merges onto the weights it was trained on"
        found.append(_advise("use LoRA on the 16-bit model", why, fitting, task="lora"))
    if task.method == "lora" and plan.stack == "transformers-4.3x":
        why = "a base model must learn the ChatML tokens: LoRA then trains embedding and head too (LoRA (emb))"
        found.append(Advice("for a base model with chat data use --task lora-emb", why, {"task": "lora-emb"}))
    return found
