"""Whose software runs it: what each stack does with cache, logits, loss and the host, as data."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwenfit.errors import UsageError, nearest
from qwenfit.planning.constants import ROWS_LIMITS, fitted, measured, read

# What a decode step reads: weights by precision ("plain": 16 bits for one request, "plain_rows" for several), KV cache
# ("_rows": for more requests than MANY_REQUESTS).
READ_KINDS = ("plain", "plain_rows", "int8", "int4", "cache", "cache_int8", "cache_rows", "cache_int8_rows")
LIMITED = READ_KINDS[2:]  # those that a fast memory brings faster than a card's cores take them
# Whose attention begins when the product before it is done (kernels/triton/decode_attention.py), by KV cache.
MANY_REQUESTS = {"cache": 7, "cache_int8": 3}
CODES_REQUESTS = 32  # up to so many, where heads are alone, an int8 cache takes what its bytes take


@dataclass(frozen=True)
class Stack:
    """The properties of one software stack that a plan depends on."""

    name: str
    what: str
    cache_copies: float  # times the KV cache exists at its peak
    last_token_logits: bool  # prompt logits for the last position only
    paged: bool  # prefixes can be shared, the cache is sized once
    kv_int8_with_flash: bool  # int8 cache and FlashAttention work together
    decode_host: float  # s per layer and step, launched from Python (0: CUDA graphs)
    decode_host_int4: float
    layer_overhead: float  # s per layer and step on the device, added to the time of the bytes
    bandwidth_share: float | None  # of peak; None: what a plain read of that card was measured to reach
    unpack: float  # s per quantized weight on an A100, scaled by bandwidth to other cards
    prefill_share: float  # of a large matrix product's speed
    train_host: float  # s per layer and micro-batch
    fused_loss: bool
    memory_error: float  # relative half-width of the memory interval
    speed_error: float  # relative half-width of the speed interval
    utilization: float | None = None  # vLLM: share of the card that the process takes
    tensor_parallel: bool = False
    read_shares: dict[str, float] = field(default_factory=dict)  # of a plain read, by kind (inference_speed); else 1
    read_limits: dict[str, float] = field(default_factory=dict)  # bytes/s that the cores take at most, by kind
    rows_limits: dict[str, dict[int, float]] = field(default_factory=dict)  # the same, for up to so many
    share_of_64: float = 1.0  # of a plain read, of 16-bit weights for 64 requests
    rows_gap: float = 0.0  # s per layer and step more with int4 and int8 weights, from 3 requests on
    plain_rows_gap: float = 0.0  # the same with 16-bit weights
    codes_gap: float = 0.0  # s per layer and step more with an int8 cache, of > CODES_REQUESTS or shared keys
    shared_gap: float = 0.0  # s per layer and step more with one or two requests, where heads share keys
    step_host: float = 0.0  # s per step that the host adds to the device's time
    prompt_host: float = 0.0  # s per prompt that the host adds to the device's time


STACKS: dict[str, Stack] = {
    s.name: s
    for s in (
        Stack(
            name="qwenfit",
            what="this project's engine and trainer",
            cache_copies=1.0,
            last_token_logits=True,
            paged=True,
            kv_int8_with_flash=True,
            decode_host=0.0,
            decode_host_int4=0.0,
            layer_overhead=measured("qwenfit_layer_gap"),
            bandwidth_share=None,
            unpack=0.0,
            prefill_share=measured("qwenfit_prefill_share"),
            train_host=0.0,  # its trainer is planned in finetune_qwenfit.py and finetune_cpu.py
            fused_loss=True,
            memory_error=0.02,
            speed_error=0.10,
            tensor_parallel=False,
            read_shares={k: measured(f"qwenfit_read_{k}") for k in READ_KINDS},
            read_limits={k: measured(f"qwenfit_limit_{k}") for k in LIMITED},
            rows_limits={
                k: {n: measured(f"qwenfit_rows_{k}_{n}") for n in limits} for k, limits in ROWS_LIMITS.items()
            },
            share_of_64=measured("qwenfit_read_plain_64"),
            rows_gap=measured("qwenfit_rows_gap"),
            plain_rows_gap=measured("qwenfit_plain_rows_gap"),
            codes_gap=measured("qwenfit_codes_gap"),
            shared_gap=measured("qwenfit_shared_gap"),
            step_host=measured("qwenfit_step_host"),
            prompt_host=measured("qwenfit_prompt_host"),
        ),
        Stack(
            name="transformers-4.3x",
            what="the guide's software: Qwen-1 remote code, AutoGPTQ, PEFT, DeepSpeed",
            cache_copies=2.0,
            last_token_logits=False,
            paged=False,
            kv_int8_with_flash=False,
            decode_host=fitted("host_decode_2023"),
            decode_host_int4=fitted("host_decode_2023_int4"),
            layer_overhead=0.0,
            bandwidth_share=fitted("bandwidth_share_2023"),
            unpack=fitted("unpack_2023"),
            prefill_share=read("prefill_share"),
            train_host=fitted("host_train_2023"),
            fused_loss=False,
            memory_error=0.05,
            speed_error=0.20,
        ),
        Stack(
            name="transformers-5",
            what="transformers 5 with PEFT: growing cache, last-token logits",
            cache_copies=1.0,
            last_token_logits=True,
            paged=False,
            kv_int8_with_flash=False,
            decode_host=fitted("host_decode_2023"),
            decode_host_int4=fitted("host_decode_2023_int4"),
            layer_overhead=0.0,
            bandwidth_share=None,
            unpack=fitted("unpack_2023"),
            prefill_share=read("prefill_share"),
            train_host=fitted("host_train_2023"),
            fused_loss=False,
            memory_error=0.05,
            speed_error=0.30,
        ),
        Stack(
            name="vllm",
            what="vLLM: a pool of utilization x card, paged cache, CUDA graphs",
            cache_copies=1.0,
            last_token_logits=True,
            paged=True,
            kv_int8_with_flash=True,  # its 8-bit cache is fp8
            decode_host=0.0,
            decode_host_int4=0.0,
            layer_overhead=fitted("vllm_layer_overhead"),
            bandwidth_share=None,
            unpack=read("vllm_unpack"),
            prefill_share=read("prefill_share"),
            train_host=0.0,
            fused_loss=False,
            memory_error=0.05,
            speed_error=0.25,
            utilization=0.9,
            tensor_parallel=True,
        ),
    )
}


def get_stack(name: str) -> Stack:
    """The stack of that name; UsageError with the nearest names otherwise."""
    if name not in STACKS:
        near = nearest(name, list(STACKS)) or list(STACKS)
        raise UsageError(f"There is no stack named {name!r}.", f"Known stacks: {', '.join(near)}.")
    return STACKS[name]
