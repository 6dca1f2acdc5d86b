"""`qwenfit bench decode|prefill`: plan a run, run it on the engine, and hold one against the other."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from qwenfit.bench.cost import Limits, cost_figures, decode_cost, measured_limits, prefill_cost
from qwenfit.bench.memory import measure_memory, process_bytes
from qwenfit.bench.profile import KernelUse, Sizes, profile_decode, profile_prefill
from qwenfit.bench.record import Figure, Record, make_record
from qwenfit.errors import QwenfitError
from qwenfit.planning.task import Inference
from qwenfit.planning.types import Plan

if TYPE_CHECKING:
    from qwenfit.engine.llm import LLM
    from qwenfit.run.planned import RunOptions

WARM_UP_TOKENS = 4


def bench(
    kind: str, options: RunOptions, sizes: Sizes, profile: bool = False, limits: Limits | None = None
) -> tuple[Record, list[KernelUse]]:
    """Plan, load, warm up, measure, compare; `kind` is "decode" or "prefill". Returns the record and, where asked for
    or needed to count launches (on a GPU), the profile of one decode step, or of the prompts.

    On a CPU the plan uses the bandwidth that a plain read reaches in this process just before; other users of the
    machine then count on both sides. `limits`: measured now where None.
    """
    from qwenfit.run.planned import load_planned, plan_run

    options = replace(options, context=sizes.prompt + sizes.generate, batch=sizes.batch)
    device = "cpu" if plan_run(options).hardware.device.kind == "cpu" else "cuda"
    limits = limits or measured_limits(device)
    before = process_bytes(device)
    started = time.perf_counter()
    llm, made = load_planned(options)
    load_seconds = time.perf_counter() - started
    made = plan_for(made, sizes, limits.read if device == "cpu" else None)
    timed_run(llm, sizes.prompt, WARM_UP_TOKENS if kind == "decode" else 1, sizes.batch, seed=0)
    runs = [timed_run(llm, sizes.prompt, sizes.generate, sizes.batch, seed=1 + i) for i in range(sizes.repeat)]
    memory = memory_figures(llm, made)
    uses: list[KernelUse] = []
    if profile or device == "cuda":
        uses = profile_decode(llm, sizes) if kind == "decode" else profile_prefill(llm, sizes)
    launches = sum(use.launches for use in uses) if device == "cuda" and uses else None
    facts: dict[str, Any] = {"prompt": sizes.prompt, "generate": sizes.generate, "batch": sizes.batch}
    facts |= {"repeat": sizes.repeat, "load_seconds": load_seconds, "bytes_before_load": before} | engine_facts(llm)
    facts |= {"limits": asdict(limits), "profile": [asdict(use) for use in uses]}
    figures = _decode_figures if kind == "decode" else _prefill_figures
    return make_record(kind, made, figures(made, runs, sizes, limits, launches) + memory, facts), uses


def plan_for(made: Plan, sizes: Sizes, bandwidth: float | None) -> Plan:
    """The plan for exactly these sizes, on the bandwidth measured now."""
    from qwenfit.hardware import with_bandwidth
    from qwenfit.planning.search import replan

    assert isinstance(made.task, Inference)
    task = replace(made.task, prompt=sizes.prompt, generate=sizes.generate, batch=sizes.batch)
    hardware = made.hardware
    if bandwidth is not None:
        hardware = replace(hardware, device=with_bandwidth(hardware.device, bandwidth))
    return replan(made, task=task, hardware=hardware)


@dataclass(frozen=True)
class Timed:
    """One measured run: seconds to the first token, tokens/s of decoding for one request, and for all together."""

    first: float
    decode: float
    total: float


def timed_run(llm: LLM, prompt: int, generate: int, batch: int, seed: int) -> Timed:
    """Random prompts (new ones for each seed, so that no prefix is cached) and greedy answers of a fixed length."""
    return timed_answers(llm, random_prompts(llm.engine.vocab_size, prompt, batch, seed), generate)[0]


def random_prompts(vocabulary: int, prompt: int, batch: int, seed: int) -> list[list[int]]:
    """`batch` prompts of `prompt` token ids each."""
    source = random.Random(seed)
    return [[source.randrange(vocabulary) for _ in range(prompt)] for _ in range(batch)]


def timed_answers(llm: LLM, prompts: list[list[int]], generate: int) -> tuple[Timed, list[list[int]]]:
    """Greedy answers of `generate` tokens each, and their times.

    Raises QwenfitError when the engine ended an answer early: its time would mean nothing.
    """
    from qwenfit.engine.params import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=generate, ignore_eos=True)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params)
    elapsed = time.perf_counter() - started
    for output in outputs:
        if output.finish_reason != "length":
            raise QwenfitError(f"An answer ended early: {output.completions[0].error or output.finish_reason}")
    stats = [output.stats for output in outputs]
    first = statistics.median(s.time_to_first_token for s in stats)
    decode = statistics.median(s.decode_tokens_per_s for s in stats)
    timed = Timed(first, decode, sum(s.completion_tokens for s in stats) / elapsed)
    return timed, [output.token_ids for output in outputs]


def _decode_figures(made: Plan, runs: list[Timed], sizes: Sizes, limits: Limits, launches: int | None) -> list[Figure]:
    each = statistics.median(run.decode or run.total / sizes.batch for run in runs)
    figures = [Figure("decode_tokens_per_s", "tokens/s each", made.speed.tokens_per_s_per_request, each)]
    if sizes.batch > 1:
        total = statistics.median(run.total for run in runs)
        figures.append(Figure("generated_tokens_per_s", "tokens/s all", made.speed.tokens_per_s, total))
    return figures + cost_figures(decode_cost(made), 1 / each, limits, launches)


def _prefill_figures(made: Plan, runs: list[Timed], sizes: Sizes, limits: Limits, launches: int | None) -> list[Figure]:
    first = statistics.median(run.first for run in runs)
    prompts = sizes.batch * sizes.prompt / first
    if sizes.batch > 1:  # the plan is for one prompt alone, and the median of many is of half of them
        return [
            Figure("time_to_first_token", "s", None, first),
            Figure("prompt_tokens_per_s", "tokens/s", None, prompts),
        ]
    figures = [
        Figure("time_to_first_token", "s", made.speed.time_to_first_token, first),
        Figure("prompt_tokens_per_s", "tokens/s", made.speed.prompt_tokens_per_s, prompts),
    ]
    return figures + cost_figures(prefill_cost(made), first, limits, launches)


def memory_figures(llm: LLM, made: Plan) -> list[Figure]:
    """Each part of the memory, planned beside measured, and what no part accounts for."""
    memory = measure_memory(llm)
    planned = made.memory
    figures = [
        Figure("weights", "GB", planned.weights / 1e9, memory.weights / 1e9),
        Figure("kv_cache", "GB", planned.kv_cache / 1e9, memory.kv_cache / 1e9),
        Figure("process", "GB", planned.process / 1e9, memory.process / 1e9),
        Figure("unaccounted", "GB", None, memory.unaccounted / 1e9),
    ]
    if llm.device.startswith("cuda"):
        figures.insert(2, Figure("allocated", "GB", planned.allocated / 1e9, memory.allocated / 1e9))
        figures.insert(3, Figure("reserved", "GB", planned.reserved / 1e9, memory.reserved / 1e9))
    return figures


def engine_facts(llm: LLM) -> dict[str, Any]:
    """Device, threads and the type of the activations, for the record."""
    import torch

    return {
        "device": llm.device,
        "threads": torch.get_num_threads(),
        "dtype": str(getattr(llm.engine.runner.model, "dtype", "")),
    }
