"""`qwenfit bench decode|prefill`: plan a run, run it on the engine, and hold one against the other."""

from __future__ import annotations

import random
import statistics
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qwenfit.bench.memory import measure_memory, process_bytes
from qwenfit.bench.record import Figure, Record, make_record
from qwenfit.planning.task import Inference
from qwenfit.planning.types import Plan

if TYPE_CHECKING:
    from qwenfit.engine.llm import LLM
    from qwenfit.run.planned import RunOptions

WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Sizes:
    """Tokens of the prompt and of the answer, requests at once, and how often to repeat."""

    prompt: int = 1
    generate: int = 128
    batch: int = 1
    repeat: int = 3


def bench(kind: str, options: RunOptions, sizes: Sizes, measure_bandwidth: bool = True) -> Record:
    """Plan, load, warm up, measure, compare. `kind` is "decode" or "prefill".

    On a CPU the plan uses the bandwidth that a plain read reaches in this process just before; other users of the
    machine then count on both sides.
    """
    from qwenfit.run.planned import load_planned

    options = replace(options, context=sizes.prompt + sizes.generate, batch=sizes.batch)
    before = process_bytes_before(options)
    started = time.perf_counter()
    llm, made = load_planned(options)
    load_seconds = time.perf_counter() - started
    made = plan_for(made, sizes, measured_read() if measure_bandwidth and llm.device == "cpu" else None)
    _generate(llm, sizes.prompt, WARM_UP_TOKENS if kind == "decode" else 1, 1, seed=0)
    runs = [_generate(llm, sizes.prompt, sizes.generate, sizes.batch, seed=1 + i) for i in range(sizes.repeat)]
    facts: dict[str, Any] = {"prompt": sizes.prompt, "generate": sizes.generate, "batch": sizes.batch}
    facts |= {"repeat": sizes.repeat, "load_seconds": load_seconds, "bytes_before_load": before} | engine_facts(llm)
    figures = _decode_figures(made, runs, sizes) if kind == "decode" else _prefill_figures(made, runs, sizes)
    return make_record(kind, made, figures + memory_figures(llm, made), facts)


def process_bytes_before(options: RunOptions) -> int:
    """What the process holds before anything is loaded, on the CPU."""
    return process_bytes("cpu")


def measured_read() -> float:
    """Bytes/s of a plain read with all threads, now."""
    from qwenfit.detect import measure_bandwidth

    return measure_bandwidth()


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
class Run:
    """One measured run: seconds to the first token, tokens/s of decoding for one request, and for all together."""

    first: float
    decode: float
    total: float


def _generate(llm: LLM, prompt: int, generate: int, batch: int, seed: int) -> Run:
    """Random prompts (new ones each time, so that no prefix is cached) and greedy answers of a fixed length."""
    from qwenfit.engine.params import SamplingParams

    source = random.Random(seed)
    vocabulary = llm.engine.vocab_size
    prompts = [[source.randrange(vocabulary) for _ in range(prompt)] for _ in range(batch)]
    params = SamplingParams(temperature=0.0, max_tokens=generate, ignore_eos=True)
    started = time.perf_counter()
    outputs = llm.generate(prompts, params)
    elapsed = time.perf_counter() - started
    stats = [output.stats for output in outputs]
    first = statistics.median(s.time_to_first_token for s in stats)
    decode = statistics.median(s.decode_tokens_per_s for s in stats)
    return Run(first, decode, sum(s.completion_tokens for s in stats) / elapsed)


def _decode_figures(made: Plan, runs: list[Run], sizes: Sizes) -> list[Figure]:
    from qwenfit.planning.inference_memory import kv_bytes_per_token
    from qwenfit.planning.stack import get_stack
    from qwenfit.planning.weights import weight_bytes, with_head

    measured = statistics.median(run.decode for run in runs)
    stack = get_stack(made.stack)
    assert isinstance(made.task, Inference)
    weights = with_head(
        made.model, weight_bytes(made.model, made.precision, made.stack), made.task.head_precision
    ).read_per_token
    per_token = kv_bytes_per_token(made.model, made.task.kv_cache, stack)
    kv = sizes.batch * (sizes.prompt + sizes.generate / 2) * per_token
    per_second = (weights + kv) * measured
    device = made.hardware.device
    figures = [
        Figure("decode_tokens_per_s", "tokens/s each", made.speed.tokens_per_s_per_request, measured),
        Figure("bytes_per_s", "GB/s", None, per_second / 1e9),
        Figure(
            "bandwidth_share",
            "of the read measured" if device.detected else "of peak",
            None,
            per_second / device.bandwidth,
        ),
    ]
    if sizes.batch > 1:
        total = statistics.median(run.total for run in runs)
        figures.append(Figure("generated_tokens_per_s", "tokens/s all", made.speed.tokens_per_s, total))
    return figures


def _prefill_figures(made: Plan, runs: list[Run], sizes: Sizes) -> list[Figure]:
    first = statistics.median(run.first for run in runs)
    return [
        Figure("time_to_first_token", "s", made.speed.time_to_first_token, first),
        Figure("prompt_tokens_per_s", "tokens/s", made.speed.prompt_tokens_per_s, sizes.prompt / first),
    ]


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
