"""The engine on this GPU: `python -m qwenfit.bench.gpu_engine --out FOLDER [--seconds 150]`.

Checks, then measures on random weights of Qwen-7B: launch parameters of `int_matmul`, decoding one request beside its
bare CUDA graph, memory, time to first token with a profile, and 256 requests of mixed lengths. A part that fails
is recorded and does not stop the next; the record is written after each. Without a GPU all of it runs on a tiny model,
which shows that it runs and measures nothing.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import nn

from qwenfit.checkpoint.resolve import resolve_model
from qwenfit.config import ModelConfig
from qwenfit.engine.llm import LLM
from qwenfit.engine.params import SamplingParams
from qwenfit.engine.sampler import Chosen
from qwenfit.model.batch import Chunk, make_batch
from qwenfit.model.kv_cache import KVCache, kv_bytes_per_token
from qwenfit.model.linear import Linear
from qwenfit.model.transformer import Transformer

Figures = dict[str, Any]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BLOCK_SIZE = 16
COMPILERS = 12
MATMUL_SHAPES = [(4096, 12288), (4096, 22016), (11008, 4096)]
MATMUL_ROWS = (16, 64, 128)
MIX_TOKENS = {"bf16": 112_944, "int8": 225_888}  # of cache: equal bytes but for the scales of int8


def tiny(name: str) -> ModelConfig:
    """The config of `name` at the size of a test."""
    config = resolve_model(name)
    group = config.num_heads // config.num_kv_heads
    return replace(
        config, num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=4 // min(4, group), head_dim=16,
        intermediate_size=96, vocab_size=512, context_length=4096, training_length=64,
    )  # fmt: skip


def measured_config() -> ModelConfig:
    return resolve_model("Qwen-7B") if GPU else tiny("Qwen-7B")


def random_network(config: ModelConfig, dtype: torch.dtype, device: str, bits: int | None = None) -> Transformer:
    """Weights of standard deviation 1 / sqrt(inputs), made where they stay; the linears of the layers in `bits`."""
    model = Transformer(config, dtype, "meta")
    for name, parameter in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        if bits is not None and module.endswith("_proj") and leaf == "weight":
            from qwenfit.bench.gpu_kernels import random_blocked

            out, inputs = parameter.shape
            owner = model.get_submodule(module)
            model.set_submodule(module, Linear(None, owner.bias, random_blocked(bits, inputs, out)))  # type: ignore[arg-type]
            continue
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        values.normal_(1.0 if "norm" in name else 0.0, 0.02 if values.dim() == 1 else values.shape[1] ** -0.5)
        setattr(model.get_submodule(module), leaf, nn.Parameter(values, requires_grad=False))
    return model.eval()


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def clean() -> None:
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def prompt(length: int, config: ModelConfig, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(config.vocab_size) for _ in range(length)]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)


# Checks


def check_flash() -> Figures:
    """torch's flash attention of several prompts at once, against each alone; where it fails, this run does without."""
    from qwenfit.kernels.triton import ragged

    if not GPU:
        return {"skipped": "needs a GPU"}
    queries, contexts = [7, 130, 300], [7, 200, 300]
    starts = [
        torch.tensor(list(accumulate(lens, initial=0)), dtype=torch.int32, device=DEVICE)
        for lens in (queries, contexts)
    ]
    empty = torch.empty(0, dtype=torch.int64, device=DEVICE)
    plan = ragged.RaggedPlan(0, empty, empty, queries, contexts, starts[0], starts[1], None)
    q = torch.randn(sum(queries), 8, 128, device=DEVICE, dtype=torch.bfloat16)
    k, v = (torch.randn(sum(contexts), 4, 128, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    expected = ragged._flash_each(q, k, v, plan, 0.09).float()
    try:
        error = relative_error(ragged._flash(q, k, v, plan, 0.09).float(), expected)
        reason = "" if error < 1e-2 else f"error {error:.1e}"
    except Exception as failure:
        error, reason = float("nan"), repr(failure)[:300]
    if reason:
        ragged._flash = ragged._flash_each
    return {"error": error, "replaced_because": reason}


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.float() - reference.float()).norm() / reference.float().norm())


def check_text() -> Figures:
    """Greedy answers of tiny float32 models: alone on the CPU, and all together on the device."""
    same: Figures = {}
    for name in ("Qwen-7B", "Qwen2.5-7B", "Qwen3-8B"):
        torch.manual_seed(1)
        config = tiny(name)
        model = random_network(config, torch.float32, "cpu")
        prompts = [prompt(n, config, n) for n in (3, 17, 70, 150, 33, 9)]
        sizes: Any = {"kv_cache": "fp32", "block_size": BLOCK_SIZE, "max_model_len": 256}
        alone = LLM.from_parts(model, config, None, num_blocks=32, max_num_seqs=1, **sizes)
        expected = [alone.generate(p, greedy(40))[0].token_ids for p in prompts]
        together = LLM.from_parts(
            model.to(DEVICE), config, None, device=DEVICE, num_blocks=24, max_num_seqs=4, max_batched_tokens=64, **sizes
        )
        got = [output.token_ids for output in together.generate(prompts, greedy(40))]
        same[name] = sum(a == b for a, b in zip(got, expected, strict=True)) / len(prompts)
    return same


@torch.inference_mode()
def check_prefill(name: str, kv: str, bits: int | None, length: int = 300) -> Figures:
    """Logits of 2 layers in bf16 against float32: a prompt whole, and in two parts beside another sequence."""
    from qwenfit.kernels.packed import dequantize

    config = replace(resolve_model(name), num_layers=2) if GPU else tiny(name)
    model = random_network(config, torch.bfloat16, DEVICE, bits)
    plain = Transformer(config, torch.float32, "meta")
    for key in [key for key, _ in plain.named_parameters()]:
        module, _, leaf = key.rpartition(".")
        owner = model.get_submodule(module)
        packed = getattr(owner, "packed", None) if leaf == "weight" else None
        value = dequantize(packed) if packed is not None else getattr(owner, leaf).float()
        setattr(plain.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
    ids = prompt(length, config, 3)
    alpha = config.ntk_alpha(length)
    expected = plain.logits(plain.eval().forward_full(torch.tensor([ids], device=DEVICE)))[0]
    blocks = -(-length // BLOCK_SIZE)
    cache = KVCache(config, 3 * blocks, BLOCK_SIZE, kv, DEVICE)
    tables = torch.randperm(3 * blocks, generator=torch.Generator().manual_seed(0)).view(3, blocks).tolist()

    def run(*chunks: Chunk) -> torch.Tensor:
        batch = make_batch(chunks, BLOCK_SIZE, DEVICE)
        return model.logits(model.forward(batch, cache)[batch.logits_indices])

    half = length // 2
    whole = run(Chunk(ids, 0, tables[0], alpha, "all"))
    run(Chunk(ids[:half], 0, tables[1], alpha, "none"), Chunk(ids[:-1], 0, tables[2], alpha, "none"))
    mixed = run(Chunk(ids[-1:], length - 1, tables[2], alpha), Chunk(ids[half:], half, tables[1], alpha, "all"))
    return {
        "model": name,
        "kv_cache": kv,
        "bits": bits,
        "whole": relative_error(whole, expected),
        "single_token": relative_error(mixed[0], expected[-1]),
        "second_part": relative_error(mixed[1:], expected[half:]),
    }


def checks() -> Figures:
    cases = [("Qwen-7B", "bf16", None), ("Qwen-7B", "int8", None), ("Qwen2.5-7B", "bf16", None)]
    cases += [("Qwen3-8B", "int8", None), ("Qwen-7B", "bf16", 4)] if GPU else []  # type: ignore[list-item]
    return {
        "flash": check_flash(),
        "same_greedy_text": check_text(),
        "prefill_errors": [check_prefill(*case) for case in cases],
    }


# Launch parameters of int_matmul


def matmul_configs(bits: int, rows: int) -> Iterable[dict[str, int]]:
    m = min(128, max(16, rows))
    for tile, codes, warps, splits, stages in (
        (64, 128, 4, 1, 3), (64, 128, 4, 2, 3), (64, 128, 4, 4, 4), (64, 256, 4, 2, 2), (128, 128, 8, 1, 3),
        (128, 128, 8, 2, 3), (128, 128, 4, 1, 4),
    ):  # fmt: skip
        yield {
            "m": m, "rows": tile, "words": codes * bits // 32, "warps": warps, "splits": splits, "stages": stages
        }  # fmt: skip


def search_matmul(share: str = "") -> Figures:
    """The best of a few configs for each shape, beside unpacking for cuBLAS and beside bf16 weights.

    `share` "I/N": only compile that part of them, for the cache on disk.
    """
    from torch.nn.functional import linear

    from qwenfit.bench.gpu_kernels import copies, random_blocked, time_us
    from qwenfit.kernels.triton import tuning
    from qwenfit.kernels.triton.int_matmul import dequantised, int_matmul

    part, parts = map(int, (share or "0/1").split("/"))
    seen, best, rows_of_table = 0, {}, []
    for bits in (4, 8):
        for inputs, out in MATMUL_SHAPES:
            make = partial(random_blocked, bits, inputs, out)
            weights = [make()] if share else copies(make, inputs * out * bits // 8)
            for rows in MATMUL_ROWS:
                x = torch.randn(rows, inputs, device=DEVICE, dtype=torch.bfloat16)
                timed = []
                for config in matmul_configs(bits, rows):
                    seen += 1
                    if share and seen % parts != part:
                        continue
                    try:
                        run: list[Callable[[], object]] = [
                            partial(int_matmul, x, one, None, None, config) for one in weights
                        ]
                        run[0]()
                        timed.append((0.0 if share else time_us(run), config))
                    except Exception:  # a config may want more shared memory than there is
                        timed.append((float("inf"), config))
                if share:
                    continue
                us, config = min(timed, key=lambda pair: pair[0])
                best[tuning.key("int_matmul", (bits, inputs, out, rows))] = config
                unpacked = dequantised(weights[0], torch.bfloat16)
                unpack = time_us([partial(_unpack_and_multiply, x, one) for one in weights])
                plain = time_us([partial(linear, x, unpacked)] * 4)
                error = relative_error(int_matmul(x, weights[0], None, None, config), linear(x, unpacked))
                rows_of_table.append(
                    {"bits": bits, "shape": f"{inputs}->{out}", "rows": rows, "us": us, "unpack_us": unpack,
                     "bf16_us_cached": plain, "error": error, "config": config, "all": [t for t, _ in timed]}
                )  # fmt: skip
    return {"rows": rows_of_table, "configs": best}


def _unpack_and_multiply(x: torch.Tensor, weight: Any) -> torch.Tensor:
    from qwenfit.kernels.triton.int_matmul import dequantised

    return torch.nn.functional.linear(x, dequantised(weight, x.dtype))


def compile_beforehand() -> list[subprocess.Popen[bytes]]:
    """Processes that compile what `search_matmul` will time, while the checks run."""
    command = [sys.executable, "-m", "qwenfit.bench.gpu_engine", "--out", os.devnull, "--compile"]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return [subprocess.Popen([*command, f"{i}/{COMPILERS}"], **quiet) for i in range(COMPILERS)]


def finish(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for it, but no longer than that."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# One request


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


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
            step.context_lens.fill_(count // 2)
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
        """Time to first token, the median of 5, and one profile each."""
        made: Figures = {}
        for length in (self.length // 4, self.length):
            times = []
            for i in range(7):
                output = self.llm.generate(prompt(length, self.config, i), greedy(1))[0]
                times.append(output.stats.time_to_first_token * 1e3)
            made[str(length)] = {"ms": sorted(times[2:])[2], "all_ms": times, "profile": self.profile(length)}
        return made

    @torch.inference_mode()
    def profile(self, length: int) -> Figures:
        """Host time to launch a prefill, its time on the device, its launches, and the kernels that take the most."""
        table = list(range(-(-length // BLOCK_SIZE)))
        chunk = Chunk(prompt(length, self.config, 9), 0, table)
        made: Figures = {}

        def run() -> None:
            batch = make_batch([chunk], BLOCK_SIZE, DEVICE)
            began = time.perf_counter()
            if GPU:
                from qwenfit.model.prefill import prefill

                hidden = prefill(self.model, batch, self.llm.engine.runner.cache, batch.logits_indices)
            else:
                hidden = self.model.forward(batch, self.llm.engine.runner.cache)[batch.logits_indices]
            self.model.logits(hidden)
            made["host_ms"] = (time.perf_counter() - began) * 1e3
            synchronize()
            made["wall_ms"] = (time.perf_counter() - began) * 1e3

        run()
        run()
        if GPU:
            made |= kernels(run)
            run()
        return made


def kernels(run: Callable[[], None]) -> Figures:
    """Launches and microseconds of a run, and of the kernels that take the most: name -> [launches, us]."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    totals: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_time:
            entry = totals.setdefault(event.name[:70], [0, 0.0])
            entry[0] += 1
            entry[1] += event.device_time
    top = dict(sorted(totals.items(), key=lambda item: -item[1][1])[:14])
    return {"launches": sum(n for n, _ in totals.values()), "gpu_us": sum(us for _, us in totals.values()), "top": top}


# Many requests


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


# The run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument("--seconds", type=float, default=150.0, help="parts that would end later are left out")
    parser.add_argument("--compile", metavar="I/N", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.compile:
        search_matmul(options.compile)
        return
    record = Record(options.out, options.seconds)
    compilers = compile_beforehand() if GPU else []
    record.part("checks", checks, 0)
    deadline = time.perf_counter() + 20
    for compiler in compilers:
        finish(compiler, max(0.0, deadline - time.perf_counter()))
    one = record.part("start", lambda: {"engine": OneRequest()}, 10).pop("engine", None)
    if one is not None:
        record.part("decode", one.decode, 12)
        record.part("first_token", one.first_token, 5)
    del one
    clean()
    record.part("mix_bf16", lambda: mix("bf16"), 35)
    record.part("mix_int8", lambda: mix("int8"), 35)
    if GPU:
        record.part("int_matmul", search_matmul, 15)
        record.part("mix_int4", lambda: mix("bf16", 4), 30)
    record.show()


class Record:
    """What the parts gave, on disk after each."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.path, self.seconds, self.began = folder / "gpu-engine.json", seconds, time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        self.made: Figures = {
            "kind": "gpu engine",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": "python -m qwenfit.bench.gpu_engine",
            "hardware": torch.cuda.get_device_name() if GPU else "no GPU: a tiny model",
            "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
            "model": measured_config().name,
        }

    def part(self, name: str, run: Callable[[], Figures], needs: float) -> Figures:
        began = time.perf_counter()
        if began - self.began + needs > self.seconds:
            made: Figures = {"left_out": f"{self.seconds:.0f} s were not enough"}
        else:
            try:
                made = run()
            except Exception as failure:
                made = {"failed": repr(failure)[:500], "where": traceback.format_exc()[-2500:]}
        shown = {key: value for key, value in made.items() if not isinstance(value, OneRequest)}
        self.made[name] = {**shown, "took_s": time.perf_counter() - began}
        self.path.write_text(json.dumps(self.made, indent=1) + "\n")
        print(name, json.dumps(self.made[name])[:1500], flush=True)
        return made

    def show(self) -> None:
        print("\n" + self.made["hardware"])
        for name, part in self.made.items():
            if isinstance(part, dict) and "took_s" in part:
                print(f"{name:12} {part['took_s']:6.1f} s  {summary(name, part)}")


def summary(name: str, part: Figures) -> str:
    if "failed" in part or "left_out" in part:
        return str(part.get("failed") or part["left_out"])[:200]
    if name == "checks":
        worst = max(max(c["whole"], c["single_token"], c["second_part"]) for c in part["prefill_errors"])
        return f"text {part['same_greedy_text']}, worst prefill error {worst:.1e}, flash {part['flash']}"
    if name == "decode":
        memory = " ".join(f"{key} {value / 1e9:.3f}" for key, value in part["memory"].items())
        return f"{part['tokens_per_s']:.1f} tokens/s, graph {part.get('bare_graph_tokens_per_s', 0):.1f}; GB: {memory}"
    if name == "first_token":
        return "; ".join(
            f"{length} tokens: {each['ms']:.1f} ms (host {each['profile']['host_ms']:.1f}, GPU "
            f"{each['profile'].get('gpu_us', 0) / 1e3:.1f}, {each['profile'].get('launches', 0)} launches)"
            for length, each in part.items()
            if length != "took_s"
        )
    if name.startswith("mix"):
        return (
            f"{part['tokens_per_s']:.0f} tokens/s in {part['seconds']:.1f} s, host waited {part['waited_s']:.1f} s, "
            f"{part['decode_steps']} + {part['mixed_steps']} steps, {part['preemptions']} preemptions, "
            f"ready after {part['ready_after_s']:.1f} s, GB: allocated {part['allocated'] / 1e9:.2f} "
            f"reserved {part['reserved'] / 1e9:.2f}"
        )
    if name == "int_matmul":
        return " | ".join(
            f"int{r['bits']} {r['shape']} x{r['rows']} {r['us']:.0f}/{r['unpack_us']:.0f}/{r['bf16_us_cached']:.0f} us"
            for r in part["rows"]
        )
    return ""


if __name__ == "__main__":
    main()
