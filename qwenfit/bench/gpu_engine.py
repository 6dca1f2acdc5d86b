"""The engine on this GPU: `python -m qwenfit.bench.gpu_engine --out FOLDER [--seconds 85] [--parts attention,...]`.

On random weights of Qwen-7B: the attention of prompts, errors of logits, time to first token with a profile, 256
requests of mixed lengths, and, when asked for, greedy text and decoding one request beside its bare CUDA graph. A part
that fails is recorded and does not stop the next; the record is written after each. Without a GPU all of it runs on a
tiny model, which shows that it runs and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
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
    record_head,
    synchronize,
    tiny,
    used_bytes,
)
from qwenfit.bench.gpu_mix import anatomy, mix
from qwenfit.bench.gpu_prefill import (
    BOUND,
    CASES,
    CONFIGS,
    check_errors,
    check_prefill,
    choose_attention,
    compile_attention,
)
from qwenfit.engine.costs import Costs
from qwenfit.engine.llm import LLM
from qwenfit.kernels.triton import tuning
from qwenfit.model.batch import Chunk, make_batch

NEEDS = {  # seconds of each part on one H200, in the order in which they are run
    "attention": 0, "errors": 8, "text": 30, "first_token": 9, "decode": 12, "mix_int8": 30, "mix_bf16": 40,
    "mix_bf16_again": 40, "mix_int4": 30, "steps_int8": 15, "steps_bf16": 15, "steps_int4": 15,
}  # fmt: skip
USUAL = "attention,errors,first_token,mix_int8,mix_bf16,mix_int4"
PAUSE = 0.15  # seconds between prompts, as a card that is never idle runs at a lower clock


def check_text() -> Figures:
    """Greedy answers of tiny float32 models, half of them with penalties: alone on the CPU, together on the device.

    The share that is the same; on a GPU with steps that are launched, and with recorded ones wherever there are any.
    """
    same: Figures = {}
    for name in ("Qwen-7B", "Qwen2.5-7B", "Qwen3-8B"):
        torch.manual_seed(1)
        config = tiny(name)
        model = random_network(config, torch.float32, "cpu")
        prompts = [prompt(n, config, n) for n in (3, 17, 70, 150, 33, 9)]
        sizes: Any = {"kv_cache": "fp32", "block_size": BLOCK_SIZE, "max_model_len": 256}
        alone = LLM.from_parts(model, config, None, num_blocks=32, max_num_seqs=1, **sizes)
        penalties: Figures = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
        params = [replace(greedy(40), **(penalties if i % 2 else {})) for i in range(len(prompts))]
        expected = [alone.generate(p, wanted)[0].token_ids for p, wanted in zip(prompts, params, strict=True)]
        together = LLM.from_parts(
            model.to(DEVICE), config, None, device=DEVICE, num_blocks=24, max_num_seqs=4, max_batched_tokens=64, **sizes
        )
        mixed = together.engine.runner._mixed
        for way in ("launched", "recorded") if GPU else ("launched",):
            together.engine.runner._mixed = mixed if way == "recorded" else None
            if mixed is not None:
                mixed.costs = Costs(1e9, 0.0)  # as if the host took for ever
            got = [output.token_ids for output in together.generate(prompts, params)]
            same[f"{name}, {way}"] = sum(a == b for a, b in zip(got, expected, strict=True)) / len(prompts)
    return same


class OneRequest:
    """An engine of one request at a time, for all that is measured on it."""

    def __init__(self) -> None:
        clean()
        self.before = used_bytes() if GPU else 0
        self.config = measured_config()
        self.length = 2048 if GPU else 48
        self.model = random_network(self.config, torch.bfloat16, DEVICE)
        self.llm = LLM.from_parts(
            self.model, self.config, None, device=DEVICE, kv_cache="bf16", block_size=BLOCK_SIZE, max_num_seqs=1,
            num_blocks=-(-(self.length + 16) // BLOCK_SIZE), prefix_cache=False,
        )  # fmt: skip

    def decode(self) -> Figures:
        """A 1-token prompt; tokens/s through the engine and of the bare graph, and the memory of it."""
        count = self.length - 16
        self.llm.generate([5], greedy(8))
        stats = self.llm.generate([5], greedy(count))[0].stats
        made: Figures = {"tokens": count, "tokens_per_s": stats.decode_tokens_per_s, "memory": self.memory()}
        graphs = self.llm.engine.runner._graphs
        if graphs is not None:
            step, graph = graphs._recorded[1]
            step.buffers.context_lens.fill_(count // 2 - 100)  # each replay goes on to the next token
            synchronize()
            began = time.perf_counter()
            for _ in range(200):
                graph.replay()
            synchronize()
            made["bare_graph_tokens_per_s"] = 200 / (time.perf_counter() - began)
        return made

    def memory(self) -> Figures:
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        cache = self.llm.engine.runner.cache.nbytes
        made = {"weights": weights, "kv_cache": cache}
        if GPU:
            allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            made |= {"allocated": allocated, "reserved": reserved, "process": used_bytes(), "before": self.before}
        return made

    def first_token(self) -> Figures:
        """Time to first token of prompts that come now and then, medians of 5; the step alone beside; and a profile.

        Prompts at once, one after the other, show what the card's clock loses when it is never idle.
        """
        made: Figures = {}
        for length in (self.length // 4, self.length):
            profile = self.profile(length)
            paused, bare, at_once = [], [], []
            for i in range(6):
                time.sleep(PAUSE)
                paused.append(self.one_prompt(length, i))
                time.sleep(PAUSE)
                bare.append(self.step(length)["wall_ms"])
            at_once = [self.one_prompt(length, 10 + i) for i in range(7)]
            made[str(length)] = {
                "ms": sorted(paused[1:])[2], "bare_ms": sorted(bare[1:])[2], "at_once_ms": sorted(at_once[2:])[2],
                "all_ms": paused, "all_bare_ms": bare, "all_at_once_ms": at_once, "profile": profile,
            }  # fmt: skip
        return made

    def one_prompt(self, length: int, seed: int) -> float:
        output = self.llm.generate(prompt(length, self.config, seed), greedy(1))[0]
        return float(output.stats.time_to_first_token * 1e3)

    @torch.inference_mode()
    def step(self, length: int) -> Figures:
        """A prefill without the engine: milliseconds of the host to launch it, and until it is done."""
        batch = make_batch([Chunk(prompt(length, self.config, 9), 0, self.table(length))], BLOCK_SIZE, DEVICE)
        synchronize()
        began = time.perf_counter()
        cache = self.llm.engine.runner.cache
        if GPU:
            from qwenfit.model.prefill import prefill

            hidden = prefill(self.model, batch, cache, batch.logits_indices)
        else:
            hidden = self.model.forward(batch, cache)[batch.logits_indices]
        self.model.logits(hidden)
        host = time.perf_counter() - began
        synchronize()
        return {"host_ms": host * 1e3, "wall_ms": (time.perf_counter() - began) * 1e3}

    @staticmethod
    def table(length: int) -> list[int]:
        return list(range(-(-length // BLOCK_SIZE)))

    def profile(self, length: int) -> Figures:
        """Host time to launch a prefill, its time on the device, its launches, and the kernels that take the most."""
        self.step(length)
        made = self.step(length)
        return made | (kernels(lambda: self.step(length)) if GPU else {})


# The run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record and the configs")
    parser.add_argument("--seconds", type=float, default=85.0, help="parts that would end later are left out")
    parser.add_argument("--parts", default=USUAL, help=f"of {','.join(NEEDS)}")
    parser.add_argument(
        "--swap", type=float, help="GB of the host's memory for requests that wait; default: the engine's"
    )
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.compile is not None:
        jobs()[options.compile]()
        return
    wanted = options.parts.split(",")
    swap_bytes = None if options.swap is None else int(1e9 * options.swap)
    record = Record(options.out, options.seconds)
    one: dict[str, OneRequest] = {}

    def engine() -> OneRequest:
        if not one:
            one["engine"] = OneRequest()
        return one["engine"]

    def attention() -> Figures:
        return {"compiling_s": compile_beforehand() if GPU else 0.0} | choose_attention()

    parts: dict[str, Callable[[], Figures]] = {
        "attention": attention,
        "errors": check_errors,
        "text": check_text,
        "first_token": lambda: engine().first_token(),
        "decode": lambda: engine().decode(),
        "mix_int8": lambda: mix("int8", swap_bytes=swap_bytes),
        "mix_bf16": lambda: mix("bf16", swap_bytes=swap_bytes),
        "mix_bf16_again": lambda: mix("bf16", swap_bytes=0),  # what is stopped is computed again
        "mix_int4": lambda: mix("bf16", 4, swap_bytes=swap_bytes),
        "steps_int8": lambda: anatomy("int8"),
        "steps_bf16": lambda: anatomy("bf16"),
        "steps_int4": lambda: anatomy("int8", 4),
    }
    for name, run in parts.items():
        if name in wanted:
            if name.startswith(("mix", "steps")):
                one.clear()
                clean()
            record.part(name, run, NEEDS[name])
    if GPU:
        tables = {"cards": [torch.cuda.get_device_name()], "configs": tuning.in_force()}
        (options.out / "tuned-engine.json").write_text(tuning.as_text(tables))
    record.show()


def jobs() -> list[Callable[[], object]]:
    """What the parts will compile, in pieces for processes beside each other; the cache on disk keeps it."""
    return [
        *(partial(warm, kv) for kv in ("int8", "bf16")),
        *(partial(check_prefill, *case) for case in CASES),
        *(partial(compile_attention, config) for config in CONFIGS),
    ]


def warm(kv: str) -> None:
    """The kernels of `mix`, on two layers."""
    config = replace(measured_config(), num_layers=2)
    llm = LLM.from_parts(
        random_network(config, torch.bfloat16, DEVICE), config, None, device=DEVICE, kv_cache=kv,
        block_size=BLOCK_SIZE, num_blocks=1024, max_num_seqs=256, max_model_len=2048,
        prefix_cache=False, max_batched_tokens=2048,
    )  # fmt: skip
    llm.generate([prompt(100, config, 1)] * 2, greedy(4))


def compile_beforehand() -> float:
    """Seconds that it took. A process that fails or is late costs time only."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "qwenfit.bench.gpu_engine", "--out", os.devnull, "--compile"]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for process in [subprocess.Popen([*command, str(i)], **quiet) for i in range(len(jobs()))]:
        try:
            process.wait(max(0.1, 25 - (time.perf_counter() - began)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return time.perf_counter() - began


class Record:
    """What the parts gave, on disk after each."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.path, self.seconds, self.began = folder / "gpu-engine.json", seconds, time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        self.made: Figures = record_head("gpu engine") | {"model": measured_config().name}

    def part(self, name: str, run: Callable[[], Figures], needs: float) -> None:
        began = time.perf_counter()
        if not GPU and name.endswith("int4"):
            made: Figures = {"left_out": "int4 weights are made on a GPU"}
        elif began - self.began + needs > self.seconds:
            made = {"left_out": f"{self.seconds:.0f} s were not enough"}
        else:
            try:
                made = run()
            except Exception as failure:
                made = {"failed": repr(failure)[:500], "where": traceback.format_exc()[-2500:]}
        self.made[name] = {**made, "took_s": time.perf_counter() - began}
        self.path.write_text(json.dumps(self.made, indent=1) + "\n")
        print(name, json.dumps(self.made[name])[:1500], flush=True)

    def show(self) -> None:
        print("\n" + self.made["hardware"])
        for name, part in self.made.items():
            if isinstance(part, dict) and "took_s" in part:
                print(f"{name:12} {part['took_s']:6.1f} s  {summary(name, part)}")


def summary(name: str, part: Figures) -> str:
    if "failed" in part or "left_out" in part:
        return str(part.get("failed") or part["left_out"])[:200]
    if name == "attention":
        return "; ".join(
            f"{row['shape']} {row['length']}: flash {row['flash']:.3f} ms, "
            f"ours {[round(ms, 3) for ms in row['ours']]}, "
            f"cuDNN {row.get('cudnn', row.get('cudnn_failed'))}, best {row['best']}"
            for row in part.get("rows", ())
            if "length" in row
        )
    if name == "errors":
        return f"worst {part['worst']:.2e}, of plain bf16 {part['worst_plain_bf16']:.2e}; the bound is {BOUND}"
    if name == "text":
        return str({model: share for model, share in part.items() if model != "took_s"})
    if name == "decode":
        memory = " ".join(f"{key} {value / 1e9:.3f}" for key, value in part["memory"].items())
        return f"{part['tokens_per_s']:.1f} tokens/s, graph {part.get('bare_graph_tokens_per_s', 0):.1f}; GB: {memory}"
    if name == "first_token":
        return "; ".join(
            f"{length} tokens: {each['ms']:.1f} ms, at once {each['at_once_ms']:.1f}, bare {each['bare_ms']:.1f} (host "
            f"{each['profile']['host_ms']:.1f}, GPU {each['profile'].get('gpu_us', 0) / 1e3:.1f}, "
            f"{each['profile'].get('launches', 0)} launches)"
            for length, each in part.items()
            if length != "took_s"
        )
    if name.startswith("mix"):
        return (
            f"{part['tokens_per_s']:.0f} tokens/s in {part['seconds']:.1f} s, host waited {part['waited_s']:.1f} s, "
            f"{part['decode_steps']} + {part['mixed_steps']} steps, {part['preemptions']} preemptions, "
            f"{part['moved_blocks']} blocks moved, "
            f"ready after {part['ready_after_s']:.1f} s, GB: allocated {part['allocated'] / 1e9:.2f} "
            f"reserved {part['reserved'] / 1e9:.2f}"
        )
    if name.startswith("steps"):
        mixed = part["mixed_step"]
        return (
            f"step {part['step_ms']:.2f} ms, host waits {part['waited_ms']:.2f}, bare graph "
            f"{part.get('bare_graph_ms', 0):.2f} ms, kernels {part.get('graph', {}).get('gpu_us', 0) / 1e3:.2f} ms; "
            f"a step with prompts {mixed.get('gpu_us', 0) / 1e3:.1f} ms; of the host {part['host_ms']}"
        )
    return ""


if __name__ == "__main__":
    main()
