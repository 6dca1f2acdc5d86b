"""256 requests of mixed lengths through the engine, and where the time of its steps goes."""

from __future__ import annotations

import cProfile
import itertools
import pstats
import random
import time
from collections.abc import Callable
from typing import Any

import torch

from qwenfit.bench.gpu_common import (
    BLOCK_SIZE,
    DEVICE,
    GPU,
    Figures,
    clean,
    greedy,
    kernels,
    measured_config,
    prompt,
    random_network,
    synchronize,
)
from qwenfit.engine.llm import LLM
from qwenfit.engine.sampler import Chosen
from qwenfit.model.kv_cache import kv_bytes_per_token

MIX_TOKENS = {"bf16": 112_944, "int8": 225_888}  # of cache: equal bytes but for the scales of int8


COUNT, LOW, HIGH = (256, 100, 1024) if GPU else (6, 4, 20)  # requests, and the bounds of their lengths


def mix(kv: str, bits: int | None = None, tokens: int | None = None, swap_bytes: int | None = None) -> Figures:
    """256 requests of 100 to 1,024 tokens in and out, uniformly random, all there at the start."""
    began = time.perf_counter()
    cached = (tokens or MIX_TOKENS[kv]) if GPU else 160
    llm = engine_of(kv, bits, cached, swap_bytes=swap_bytes)
    config = llm.config
    ready = time.perf_counter() - began
    lengths = random.Random(0)
    sizes = [(lengths.randint(LOW, HIGH), lengths.randint(LOW, HIGH)) for _ in range(COUNT)]
    prompts = [prompt(n, config, i) for i, (n, _) in enumerate(sizes)]
    waited, steps, times, brought, taken = watch(llm)
    began = time.perf_counter()
    outputs = llm.generate(prompts, [greedy(n) for _, n in sizes])
    seconds = time.perf_counter() - began
    times.append(began + seconds)
    lasted = [after - before for before, after in itertools.pairwise(times)]
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
        "decode_s": sum(t for t, decodes in zip(lasted, steps, strict=True) if decodes),
        "slowest_steps": sorted(
            (
                (round(1e3 * seconds, 1), index, brought[index], *taken.get(index, (0.0, 0, 0)))
                for index, seconds in enumerate(lasted)
            ),
            reverse=True,
        )[:16],  # milliseconds, which, its tokens, milliseconds to launch it, and allocations meanwhile as in `watch`
        "mixed_s": sum(t for t, decodes in zip(lasted, steps, strict=True) if not decodes),
        "swap_bytes": swap_bytes,
        "moved_blocks": llm.engine.host.num_moved if llm.engine.host is not None else 0,
        "preemptions": llm.engine.scheduler.num_preemptions,
        "allocated": torch.cuda.max_memory_allocated() if GPU else 0,
        "reserved": torch.cuda.max_memory_reserved() if GPU else 0,
    }


def anatomy(kv: str, bits: int | None = None) -> Figures:
    """Steps of 256 requests of some 600 tokens: the host's part, the device's by kernel, and the bare graph.

    A step that takes longer than both the bare graph and the host's part is one in which the two take turns.
    """
    count, context, some = (COUNT if kv == "int8" else COUNT // 2, 600, 20) if GPU else (4, 16, 2)
    llm = engine_of(kv, bits, count * (context + 96))
    engine, config = llm.engine, llm.config
    for i in range(count):
        engine.add(prompt(context, config, i), greedy(context))
    mixed: Figures = {}
    while not all(request.num_generated for request in engine.scheduler.running) or engine.scheduler.waiting:
        if GPU and not mixed and len(engine.scheduler.running) > count // 2:
            mixed = kernels(engine.step)
            continue
        engine.step()
    waited, *_ = watch(llm)
    synchronize()
    lasted = _seconds(lambda: _times(engine.step, some))
    hosts = pstats.Stats(_profiled(lambda: _times(engine.step, some))).stats  # type: ignore[attr-defined]
    busiest = sorted(hosts.items(), key=lambda item: -item[1][2])[:24]
    made: Figures = {
        "requests": count,
        "step_ms": 1e3 * lasted / some,
        "waited_ms": 1e3 * sum(waited[:some]) / some,
        "host_ms": {f"{at[0][-30:]}:{at[2]}": round(1e3 * use[2] / some, 3) for at, use in busiest},
        "mixed_step": mixed,
    }
    graphs = engine.runner._graphs
    if graphs is not None:
        made["step"] = kernels(engine.step)
        step, graph = graphs._recorded[next(size for size in graphs.sizes if size >= count)]
        made["context"] = int(step.buffers.context_lens.sum()) / count
        synchronize()
        # Each goes on to the next token, beyond what the engine knows of: nothing after this asks for its answers.
        made["bare_graph_ms"] = 1e3 * _seconds(lambda: _times(graph.replay, some)) / some
        made["graph"] = kernels(graph.replay)
    return made


def _profiled(run: Callable[[], object]) -> cProfile.Profile:
    profile = cProfile.Profile()
    profile.enable()
    run()
    profile.disable()
    return profile


def _times(run: Callable[[], object], count: int) -> None:
    for _ in range(count):
        run()


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - began


def engine_of(kv: str, bits: int | None, cached: int, name: str = "Qwen-7B", swap_bytes: int | None = None) -> LLM:
    """A model of random weights with a cache of so many tokens, warmed up."""
    clean()
    config = measured_config(name)
    model = random_network(config, torch.bfloat16, DEVICE, bits)
    llm = LLM.from_parts(
        model, config, None, device=DEVICE, kv_cache=kv, block_size=BLOCK_SIZE, num_blocks=cached // BLOCK_SIZE,
        max_num_seqs=COUNT, max_model_len=2 * HIGH, prefix_cache=False, max_batched_tokens=2048,
        swap_bytes=swap_bytes,
    )  # fmt: skip
    llm.generate([prompt(LOW, config, 1)] * 2, greedy(4))
    synchronize()
    return llm


def watch(
    llm: LLM,
) -> tuple[list[float], list[bool], list[float], list[int], dict[int, tuple[float, int, int]]]:
    """Seconds that the host waits for each step, whether a step only decodes, when it begins, and its tokens.

    For steps with prompts also: milliseconds to launch it, and how often that took more of the device's memory and of
    pinned memory from the system, for either of which the device may have to stop. All fill as the engine runs. A host
    that never waits is what binds.
    """
    waited: list[float] = []
    steps: list[bool] = []
    times: list[float] = []
    tokens: list[int] = []
    taken: dict[int, tuple[float, int, int]] = {}
    runner, sampler = llm.engine.runner, llm.engine.sampler
    run, choose = runner.run, sampler.choose

    def counted(requests: Any) -> Any:
        steps.append(all(request.scheduled == 1 for request in requests))
        times.append(time.perf_counter())
        tokens.append(sum(request.scheduled for request in requests))
        if steps[-1]:
            return run(requests)
        device, pinned = _allocations()
        began = time.perf_counter()
        made = run(requests)
        lasted = 1e3 * (time.perf_counter() - began)
        after = _allocations()
        taken[len(steps) - 1] = (round(lasted, 1), after[0] - device, after[1] - pinned)
        return made

    def timed(logits: Any, requests: Any, likeliest: Any = None) -> Chosen:
        chosen = choose(logits, requests, likeliest)
        read = chosen.read

        def wait() -> Any:
            began = time.perf_counter()
            result = read()
            waited.append(time.perf_counter() - began)
            return result

        chosen.read = wait  # type: ignore[method-assign]
        return chosen

    runner.run, sampler.choose = counted, timed  # type: ignore[method-assign]
    return waited, steps, times, tokens, taken


def _allocations() -> tuple[int, int]:
    """How often memory of the device and pinned memory were taken from the system."""
    if not GPU:
        return 0, 0
    return torch.cuda.memory_stats().get("num_device_alloc", 0), torch.cuda.host_memory_stats().get("num_host_alloc", 0)
