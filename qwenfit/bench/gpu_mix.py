"""256 requests of mixed lengths through the engine."""

from __future__ import annotations

import random
import time
from typing import Any

import torch

from qwenfit.bench.gpu_common import (
    BLOCK_SIZE,
    DEVICE,
    GPU,
    Figures,
    clean,
    greedy,
    measured_config,
    prompt,
    random_network,
    synchronize,
)
from qwenfit.engine.llm import LLM
from qwenfit.engine.sampler import Chosen
from qwenfit.model.kv_cache import kv_bytes_per_token

MIX_TOKENS = {"bf16": 112_944, "int8": 225_888}  # of cache: equal bytes but for the scales of int8


def mix(kv: str, bits: int | None = None, tokens: int | None = None) -> Figures:
    """256 requests of 100 to 1,024 tokens in and out, uniformly random, all there at the start."""
    clean()
    config = measured_config()
    count, low, high = (256, 100, 1024) if GPU else (6, 4, 20)
    cached = (tokens or MIX_TOKENS[kv]) if GPU else 160
    began = time.perf_counter()
    model = random_network(config, torch.bfloat16, DEVICE, bits)
    llm = LLM.from_parts(
        model, config, None, device=DEVICE, kv_cache=kv, block_size=BLOCK_SIZE, num_blocks=cached // BLOCK_SIZE,
        max_num_seqs=count, max_model_len=2 * high, prefix_cache=False, max_batched_tokens=2048,
    )  # fmt: skip
    llm.generate([prompt(low, config, 1)] * 2, greedy(4))
    synchronize()
    ready = time.perf_counter() - began
    lengths = random.Random(0)
    sizes = [(lengths.randint(low, high), lengths.randint(low, high)) for _ in range(count)]
    prompts = [prompt(n, config, i) for i, (n, _) in enumerate(sizes)]
    waited, steps = watch(llm)
    began = time.perf_counter()
    outputs = llm.generate(prompts, [greedy(n) for _, n in sizes])
    seconds = time.perf_counter() - began
    made = sum(len(output.token_ids) for output in outputs)
    return {
        "kv_cache": kv,
        "bits": bits,
        "cache_tokens": cached,
        "cache_bytes": cached * kv_bytes_per_token(config, kv),
        "output_tokens": made,
        "prompt_tokens": sum(n for n, _ in sizes),
        "seconds": seconds,
        "tokens_per_s": made / seconds,
        "ready_after_s": ready,
        "waited_s": sum(waited),
        "decode_steps": steps.count(True),
        "mixed_steps": steps.count(False),
        "preemptions": llm.engine.scheduler.num_preemptions,
        "allocated": torch.cuda.max_memory_allocated() if GPU else 0,
        "reserved": torch.cuda.max_memory_reserved() if GPU else 0,
    }


def watch(llm: LLM) -> tuple[list[float], list[bool]]:
    """Seconds that the host waits for each step, and whether the step only decodes; both fill as the engine runs.

    A host that never waits is what binds.
    """
    waited: list[float] = []
    steps: list[bool] = []
    runner, sampler = llm.engine.runner, llm.engine.sampler
    run, choose = runner.run, sampler.choose

    def counted(requests: Any) -> Any:
        steps.append(all(request.scheduled == 1 for request in requests))
        return run(requests)

    def timed(logits: Any, requests: Any) -> Chosen:
        chosen = choose(logits, requests)
        read = chosen.read

        def wait() -> Any:
            began = time.perf_counter()
            result = read()
            waited.append(time.perf_counter() - began)
            return result

        chosen.read = wait  # type: ignore[method-assign]
        return chosen

    runner.run, sampler.choose = counted, timed  # type: ignore[method-assign]
    return waited, steps
