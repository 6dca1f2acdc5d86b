"""A step of a prompt and decoding requests on a GPU: launched kernel by kernel, and recorded.

    python -m qwenfit.bench.gpu_mixed --out OUT [--model Qwen-7B] [--bits 4] [--kv bf16,int8] [--requests 110]

Writes OUT/gpu-mixed.json and prints a table. Without a GPU a tiny model shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from qwenfit.bench.gpu_common import GPU, Figures, greedy, prompt, record_head, relative_error, synchronize
from qwenfit.bench.gpu_mix import engine_of
from qwenfit.engine.costs import Costs
from qwenfit.engine.llm import LLM
from qwenfit.engine.request import Request

LENGTHS = (256, 512, 1024, 1900) if GPU else (8, 16)  # tokens of the prompt
TIMES = 6 if GPU else 2


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="Qwen-7B")
    parser.add_argument("--bits", type=int, help="of the weights: 4 or 8")
    parser.add_argument("--kv", default="bf16,int8")
    parser.add_argument("--requests", type=int, default=110 if GPU else 3)
    parser.add_argument("--context", type=int, default=800 if GPU else 12)
    options = parser.parse_args()
    made: Figures = record_head("gpu mixed") | {
        "model": options.model, "bits": options.bits, "requests": options.requests, "context": options.context,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    for kv in options.kv.split(","):
        made[kv] = measure(options.model, options.bits, kv, options.requests, options.context)
        (options.out / "gpu-mixed.json").write_text(json.dumps(made, indent=1) + "\n")
        print(f"\n{made['hardware']}, {options.model} {options.bits or 16} bits, {kv} cache")
        print(f"{options.requests} requests of {options.context} tokens")
        print(f"{'ms of a step':40}" + "".join(f"{length:>9}" for length in LENGTHS))
        for name, figures in made[kv].items():
            shown = [figures.get(str(length)) for length in LENGTHS]
            print(f"{name:40}" + "".join(f"{x:9.2f}" if isinstance(x, float) else f"{x!s:>9.8}" for x in shown))


def measure(name: str, bits: int | None, kv: str, count: int, context: int) -> Figures:
    """Milliseconds of a step by how it is run and the length of its prompt, and the error against the launched one."""
    llm = engine_of(kv, bits, count * (context + 160) + 4096, name)
    engine, config = llm.engine, llm.config
    for i in range(count):
        engine.add(prompt(context, config, i), greedy(200 if GPU else 8))
    while engine.scheduler.waiting or not all(request.num_generated for request in engine.scheduler.running):
        engine.step()
    figures: Figures = {}
    expected: dict[int, torch.Tensor] = {}  # the logits of the launched step by the length of its prompt
    mixed = engine.runner._mixed
    if mixed is not None:
        figures["launching, as measured at the start"] = dict.fromkeys(map(str, LENGTHS), 1e3 * mixed.costs.launching)
        figures["recorded, without contexts"] = {str(size): 1e3 * seconds for size, seconds in mixed.seconds.items()}
    for way in ways(llm):
        figures[way], errors = {}, {}
        for length in LENGTHS:
            fits = min(length, engine.scheduler.max_batched_tokens - count)
            request_id = engine.add(prompt(fits, config, length), greedy(1))
            batch = engine.scheduler.schedule()
            try:
                figures[way][str(length)], logits = timed(llm, parts(way, batch))
                if way == "launched":
                    expected[length] = logits
                elif len(logits) == len(expected[length]):
                    errors[str(length)] = relative_error(logits, expected[length])
            finally:
                engine.scheduler.undo(batch)
                engine.abort(request_id)
        if errors:
            figures[way]["error"] = max(errors.values())
    return figures


def parts(way: str, batch: list[Request]) -> list[Request]:
    """What of the batch is run: the prompt is its last."""
    if way == "decoding alone":
        return batch[:-1]
    return batch[-1:] if way.startswith("prompt alone") else batch


def ways(llm: LLM) -> Iterator[str]:
    """Set up one way to run a step after the other; yields its name."""
    runner = llm.engine.runner
    mixed, runner._mixed = runner._mixed, None
    yield "launched"
    yield "decoding alone"
    yield "prompt alone"
    if mixed is None:
        return
    runner._mixed = mixed
    yield "as the engine chooses"
    mixed.record(Costs(1e9, 0.0))  # as if the host took for ever
    yield "recorded"


def timed(llm: LLM, batch: list[Request]) -> tuple[float, torch.Tensor]:
    """Milliseconds of the step and its logits, from the same tokens each time."""
    runner = llm.engine.runner
    last = runner._last.clone()

    def run() -> torch.Tensor:
        runner._last.copy_(last)
        logits, _ = runner.run(batch)
        assert logits is not None
        return logits

    logits = run().clone()
    for _ in range(2):  # a prompt's graph is recorded when it comes again
        run()
    synchronize()
    began = time.perf_counter()
    for _ in range(TIMES):
        run()
    synchronize()
    lasted = 1e3 * (time.perf_counter() - began) / TIMES
    runner._last.copy_(last)
    return lasted, logits


if __name__ == "__main__":
    main()
