"""What no run can do: laws that hold for any software, or for any run of the software that a row names.

A figure that breaks one is impossible, whatever the plan says. Each function returns bounds in the figure's unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from qwenfit.config import ModelConfig
from qwenfit.guide.types import Bound, Claim, Line
from qwenfit.hardware import Hardware
from qwenfit.planning.constants import GB, GIB, read
from qwenfit.planning.finetune_memory import lora_parameters, states_lower_bound
from qwenfit.planning.finetune_speed import training_flops
from qwenfit.planning.inference_memory import kv_bytes_per_token
from qwenfit.planning.stack import get_stack
from qwenfit.planning.task import Finetune, Inference
from qwenfit.planning.weights import weight_bytes

ROUNDING = 0.01  # the tables print two to five digits
FALL = 0.02  # repeated runs of one software: how much less a larger task may show
BULGE = 0.05  # how far allocated memory may lie above the chord of its neighbours
STACK = "transformers-4.3x"


def card_capacity(hardware: Hardware, gpus: int, unit: int) -> Bound:
    """Memory on `gpus` cards is at most what the vendor sells with them."""
    total = gpus * hardware.device.memory_bytes
    count = f"{gpus} x " if gpus > 1 else ""
    law = f"above the {total / GIB:.1f} GiB ({total / GB:.1f} GB) of {count}{hardware.device.name}"
    return Bound(law, high=total / unit * (1 + ROUNDING))


def inference_least(config: ModelConfig, task: Inference, precision: str) -> Bound:
    """GiB of weights and one KV cache."""
    weights = weight_bytes(config, precision, STACK).total
    cache = task.batch * task.context * kv_bytes_per_token(config, task.kv_cache, get_stack(STACK))
    law = f"below weights ({weights / GIB:.1f}) and one KV cache ({cache / GIB:.1f} GiB)"
    return Bound(law, low=(weights + cache) / GIB * (1 - ROUNDING))


def decode_ceiling(config: ModelConfig, hardware: Hardware, task: Inference, precision: str, shards: int) -> Bound:
    """Tokens/s of one request: each step reads the weights and the cache once, at no more than peak bandwidth."""
    weights = weight_bytes(config, precision, STACK).read_per_token
    cache = (task.prompt + task.generate / 2) * kv_bytes_per_token(config, task.kv_cache, get_stack(STACK))
    most = shards * hardware.device.bandwidth / (weights + cache)
    law = f"above {most:.1f} tokens/s, which the peak bandwidth gives for {(weights + cache) / GB:.1f} GB a token"
    return Bound(law, high=most * (1 + ROUNDING))


def states_least(config: ModelConfig, hardware: Hardware, task: Finetune) -> Bound:
    """GB per card that weights, gradients and optimizer take, however they are spread over the cards."""
    gpus = hardware.world_size
    least = states_lower_bound(config, task, gpus)
    if task.method == "full":
        what = f"16 bytes for each of {config.parameters / 1e9:.2f}e9 parameters"
    else:
        precision = "int4" if task.method == "qlora" else "bf16"
        adapters = lora_parameters(config, task.lora_rank)
        weights = weight_bytes(config, precision, STACK).total
        what = (
            f"{precision} weights ({weights / GB:.1f} GB) and 16 bytes for each of "
            f"{adapters / 1e6:.0f}e6 adapter parameters"
        )
    spread = f" over {gpus} cards" if gpus > 1 else ""
    return Bound(f"below {least / GB:.1f} GB: {what}{spread}", low=least / GB * (1 - ROUNDING))


def run_exists(config: ModelConfig, hardware: Hardware, task: Finetune) -> tuple[Bound, ...]:
    """A bound that every figure breaks, when the states alone exceed the card; else none."""
    least, card = states_lower_bound(config, task, hardware.world_size), hardware.device.memory_bytes
    if least <= card:
        return ()
    law = f"no such run: the states alone take {least / GB:.1f} GB on each card of {card / GB:.1f} GB"
    return (Bound(law, low=math.inf),)


def compute_floor(config: ModelConfig, hardware: Hardware, task: Finetune) -> Bound:
    """Seconds per iteration at the card's peak FLOP/s, with nothing recomputed."""
    flops = task.grad_accum * training_flops(config, replace(task, checkpointing=False))
    peak = hardware.device.flops["bf16"]
    least = flops / peak
    law = f"below {least:.1f} s: {flops:.2g} FLOPs at the card's peak of {peak / 1e12:.0f} TFLOP/s"
    return Bound(law, low=least * (1 - ROUNDING))


def zero3_link_floor(config: ModelConfig, hardware: Hardware, task: Finetune) -> Bound:
    """Seconds per iteration to receive the other cards' weights, in the forward and again in the backward pass.

    ZeRO-3 keeps its own share and at most stage3_max_live_parameters (1e9, 2 bytes each) between the passes.
    """
    devices = hardware.world_size
    link = hardware.device.link_bandwidth
    assert link is not None
    missing = weight_bytes(config, "bf16", STACK).total * (devices - 1) / devices - 2 * read("zero3_live_parameters")
    received = task.grad_accum * 2 * max(0.0, missing)
    law = (
        f"below {received / link:.1f} s: ZeRO-3 receives {received / GB:.0f} GB an iteration over {link / GB:.0f} GB/s"
    )
    return Bound(law, low=received / link * (1 - ROUNDING))


def with_line_bounds(claims: Iterable[Claim]) -> list[Claim]:
    """The claims, each with what its neighbours on its line allow.

    Memory and time do not fall when batch or length grow. Allocated memory is the largest of a few moments of a run,
    each affine in batch and length, so it is convex: a figure lies on or below the chord of its two neighbours.
    (A finetuning process's memory includes blocks that the allocator keeps, and is not bound to that.)
    """
    claims = list(claims)
    lines: dict[Line, dict[int, float]] = {}  # a line's figures by position
    for claim in claims:
        if claim.line is not None and claim.tested is not None:
            lines.setdefault(claim.line, {})[claim.position] = claim.tested
    return [
        replace(claim, bounds=(*claim.bounds, *_line_bounds(claim.line, lines[claim.line], claim.position)))
        if claim.line is not None and claim.tested is not None
        else claim
        for claim in claims
    ]


def _line_bounds(line: Line, figures: dict[int, float], position: int) -> list[Bound]:
    before = max((x for x in figures if x < position), default=None)
    after = min((x for x in figures if x > position), default=None)
    if before is None:
        return []
    low = figures[before]
    found = [Bound(f"less than at {line.unit} {before} ({low:g})", low=low * (1 - FALL))]
    if after is not None and line.convex:
        high = figures[after]
        chord = low + (position - before) / (after - before) * (high - low)
        law = f"above {chord:.1f}, the line from {line.unit} {before} ({low:g}) to {line.unit} {after} ({high:g})"
        found.append(Bound(law, high=chord * (1 + BULGE)))
    return found
