"""Decode whole models of random weights on this GPU: `python -m qwenfit.bench.gpu_decode --out FOLDER`.

A run decodes 2,048 tokens from a 1-token prompt (or some tokens at a longer context) by replaying a CUDA graph of the
step. The limit is the card's measured read rate over the bytes that a token must read: all weights but the embedding
table, and the mean cache. The step's logits are compared with the plain network in float32, on the same weights, and
where the cache is quantized also with that network attending to what the step's cache holds: the error that is then
left is the kernels' own. `--tuned` takes the configs that gpu_kernels.py has found; some runs are repeated without one
of the choices in them, so that what it brings is seen in a whole step.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwenfit.bench.gpu_common import need_gpu, record_head
from qwenfit.bench.gpu_kernels import random_blocked
from qwenfit.bench.gpu_prefill import StoredContext, in_float32, reference_logits
from qwenfit.checkpoint.resolve import resolve_model
from qwenfit.config import ModelConfig
from qwenfit.kernels.triton import tuning
from qwenfit.kernels.triton.greedy import greedy
from qwenfit.kernels.triton.int_matvec import BlockedWeight
from qwenfit.kernels.triton.launch import compile_side_by_side, device_limits
from qwenfit.kernels.triton.step_inputs import advance
from qwenfit.model.decode import DecodeStep
from qwenfit.model.kv_cache import KVCache, kv_bytes_per_token
from qwenfit.model.linear import Linear
from qwenfit.model.transformer import Transformer

RUNS = [  # model, precision of the layers, KV cache, tokens in the cache at the start, tokens to decode, sequences
    ("Qwen-7B", "bf16", "bf16", 0, 2048, 1),
    ("Qwen-7B", "int8", "bf16", 0, 2048, 1),
    ("Qwen-7B", "int4", "bf16", 0, 2048, 1),
    ("Qwen-1.8B", "bf16", "bf16", 0, 2048, 1),
    ("Qwen-1.8B", "int4", "bf16", 0, 2048, 1),
    ("Qwen-7B", "int4", "bf16", 8064, 128, 1),
    ("Qwen-7B", "int4", "int8", 8064, 128, 1),
    ("Qwen-14B", "bf16", "bf16", 0, 512, 1),
    ("Qwen-14B", "int4", "bf16", 0, 512, 1),
    ("Qwen-72B", "int4", "bf16", 0, 512, 1),
    ("Qwen-7B", "bf16", "bf16", 960, 64, 64),
    ("Qwen-7B", "bf16", "int8", 960, 64, 128),
    *((name, "int4", "bf16", 960, 64, count) for name in ("Qwen-7B", "Qwen-1.8B") for count in (2, 4, 8, 16, 64)),
    *(("Qwen-7B", "int8", "bf16", 960, 64, count) for count in (4, 16, 64)),
    *(("Qwen2.5-7B", "int4", kv, 960, 64, count) for count in (1, 2, 4, 8, 16, 64, 256) for kv in ("bf16", "int8")),
    *((name, "bf16", "bf16", 960, 64, count) for name in ("Qwen-7B", "Qwen-1.8B") for count in (4, 16, 32)),
    *(("Qwen2.5-7B", "bf16", "bf16", 960, 64, count) for count in (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    *(("Qwen2.5-7B", "int8", "bf16", 960, 64, count) for count in (1, 4, 8, 16, 64, 256)),
    *(("Qwen2.5-7B", "int4", "bf16", 960, 64, count) for count in (24, 96, 192)),  # of the engine's sizes
    *(("Qwen2.5-7B", "int8", "bf16", 960, 64, count) for count in (96, 192)),
    *(("Qwen2.5-0.5B", precision, "bf16", 960, 64, count) for precision in ("int4", "bf16") for count in (4, 16)),
    *((f"Qwen2.5-{size}", precision, "bf16", 960, 64, 1) for size in ("0.5B", "1.5B", "3B", "14B", "32B", "72B")
      for precision in ("int4", "int8", "bf16") if (size, precision) != ("72B", "bf16")),
    *((f"Qwen3-{size}", precision, "bf16", 960, 64, 1) for size in ("0.6B", "1.7B", "4B", "8B", "14B", "32B")
      for precision in ("int4", "int8", "bf16")),
    *(("Qwen-7B", "int4", "int8", 960, 64, count) for count in (16, 64, 256)),
    *(("Qwen-7B", "bf16", "int8", 960, 64, count) for count in (16, 32)),
    *(("Qwen-7B", "int4", "bf16", 4000, 64, count) for count in (8, 16)),
    *(("Qwen3-8B", "int4", "bf16", 960, 64, count) for count in (8, 16, 64)),
]  # fmt: skip
CHECKS = [  # precision of the layers, KV cache, model, sequences
    ("bf16", "bf16", "Qwen-7B", 1),
    ("int8", "bf16", "Qwen-7B", 1),
    ("int4", "bf16", "Qwen-7B", 1),
    ("bf16", "int8", "Qwen-7B", 1),
    ("bf16", "bf16", "Qwen2.5-7B", 1),
    ("bf16", "int8", "Qwen2.5-7B", 1),
    ("int4", "bf16", "Qwen3-8B", 1),
    *(("int4", "bf16", "Qwen-7B", count) for count in (3, 8, 16, 100)),
    *(("int4", "bf16", "Qwen2.5-7B", count) for count in (5, 40)),
    *(("int8", "bf16", "Qwen-7B", count) for count in (16, 64)),
    *(("bf16", "bf16", name, count) for name, count in (("Qwen-7B", 12), ("Qwen-1.8B", 24), ("Qwen2.5-7B", 40))),
    *((precision, "bf16", "Qwen3-4B", 1) for precision in ("int4", "int8", "bf16")),
    *(("int4", "bf16", f"Qwen2.5-{size}", 1) for size in ("0.5B", "1.5B", "14B", "32B", "72B")),
    *(("int8", "bf16", f"Qwen2.5-{size}", 1) for size in ("1.5B", "14B", "32B")),
    *(("bf16", "bf16", f"Qwen2.5-{size}", 1) for size in ("0.5B", "3B")),
    ("bf16", "int8", "Qwen3-4B", 1),
    *(("bf16", "bf16", name, count) for name, count in (("Qwen-7B", 100), ("Qwen-1.8B", 192), ("Qwen2.5-7B", 130))),
    ("int8", "bf16", "Qwen-7B", 150),  # unpacked
]
WITHOUT = [(2, "early"), (4, "early")]  # index of RUNS, what it is run without
LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
BLOCK_SIZE = 16


def random_model(config: ModelConfig, precision: str, zeros: bool = False) -> Transformer:
    """Random weights made on the GPU, with a standard deviation of 1 / sqrt(inputs); zeros: as of AWQ."""
    model = Transformer(config, torch.bfloat16, "meta")
    for name, parameter in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        if precision != "bf16" and module.endswith(LINEARS) and leaf == "weight":
            out, inputs = parameter.shape
            packed = random_blocked(int(precision[3:]), inputs, out, zeros)
            model.set_submodule(module, Linear(None, owner.bias, packed))  # type: ignore[arg-type]
            continue
        owner = model.get_submodule(module)
        # In place: a temporary copy of a large weight would leave holes that the allocator keeps.
        values = torch.empty(parameter.shape, dtype=torch.bfloat16, device="cuda")
        values.normal_(1.0 if "norm" in name else 0.0, 0.02 if values.dim() == 1 else parameter.shape[1] ** -0.5)
        setattr(owner, leaf, nn.Parameter(values, requires_grad=False))
    return model.eval()


def read_bytes(model: Transformer) -> int:
    """Weights that one token reads: all but the embedding table."""
    total = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("embed_tokens"))
    return total + sum(
        module.packed.nbytes for module in model.modules() if isinstance(module, Linear) and module.packed
    )


def start(model: Transformer, kv: str, context: int, tokens: int, batch: int) -> DecodeStep:
    """A step whose sequences have `context` random tokens in the cache; blocks are shuffled."""
    width = -(-(context + tokens + 1) // BLOCK_SIZE)
    cache = KVCache(model.config, width * batch, BLOCK_SIZE, kv, "cuda")
    if context:
        for layer in cache.layers:
            for stored, affine in ((layer.key, layer.key_affine), (layer.value, layer.value_affine)):
                if affine is None:
                    stored.normal_()
                else:
                    stored.random_(0, 256)
                    affine[..., 0].fill_(4 / 255)
                    affine[..., 1].fill_(127.5)
    step = DecodeStep(model, cache, batch, width, torch.device("cuda"))
    buffers = step.buffers
    buffers.block_tables.copy_(torch.randperm(width * batch, device="cuda").view(batch, width))
    buffers.input_ids.copy_(torch.arange(batch) + 1)
    buffers.positions.fill_(context)
    buffers.context_lens.fill_(context + 1)
    buffers.rows.copy_(torch.arange(batch))
    block = buffers.block_tables[:, context // BLOCK_SIZE].long()
    buffers.slots.copy_(block * BLOCK_SIZE + context % BLOCK_SIZE)
    return step


def record_graph(step: DecodeStep) -> torch.cuda.CUDAGraph:
    """A graph of: the step, greedy choice, and moving on to the next token. Leaves `step` as it was."""

    def once() -> None:
        tokens = greedy(step.run(), step.model.config.vocab_size)
        advance(step.buffers, tokens, torch.empty_like(tokens), BLOCK_SIZE)

    with unmoved(step):
        compile_side_by_side(lambda: step.run(layers=1))
        once()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
    return graph


@contextmanager
def unmoved(step: DecodeStep) -> Iterator[None]:
    """Leave the step's inputs as they were before."""
    tensors = tuple(vars(step.buffers).values())
    before = [tensor.clone() for tensor in tensors]
    yield
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)


def run(
    name: str, precision: str, kv: str, context: int, tokens: int, batch: int, read_rate: float, zeros: bool = False
) -> dict[str, Any]:
    torch.cuda.empty_cache()
    used_before = used_bytes()
    torch.cuda.reset_peak_memory_stats()
    model = random_model(resolve_model(name), precision, zeros)
    step = start(model, kv, context, tokens, batch)
    weights = read_bytes(model) + model.embed_tokens.weight.nbytes
    graph = record_graph(step)
    graph.replay()
    torch.cuda.synchronize()
    step.buffers.context_lens.fill_(context + 1)
    step.buffers.positions.fill_(context)
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    for _ in range(tokens):
        graph.replay()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - began) / tokens
    kv_bytes = int(kv_bytes_per_token(model.config, kv) * (context + tokens / 2) * batch)
    limit = read_rate / (read_bytes(model) + kv_bytes)
    return {
        "model": name,
        "precision": precision,
        "kv_cache": kv,
        "context": context,
        "tokens": tokens,
        "batch": batch,
        "tokens_per_s": batch / seconds,
        "ms_per_step": seconds * 1e3,
        "limit_tokens_per_s": batch * limit,
        "share": 1 / seconds / limit,
        "weight_bytes": weights,
        "cache_bytes": step.cache.nbytes,
        "allocated": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "process": used_bytes() - used_before,
        "kernels_us": profile(graph),
    }


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def profile(graph: torch.cuda.CUDAGraph) -> dict[str, list[float]]:
    """Kernel name -> [launches, microseconds in all] of one replay. Overlapping kernels count twice."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as profiler:
        graph.replay()
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = {}
    for event in profiler.events():
        if "memcpy" in event.name.lower() or event.device_time == 0:
            continue
        entry = totals.setdefault(event.name[:60], [0, 0.0])
        entry[0] += 1
        entry[1] += event.device_time
    return totals


def check(
    precision: str, kv: str, name: str = "Qwen-7B", count: int = 1, zeros: bool = False, length: int = 24
) -> dict[str, Any]:
    """Relative error of the step's logits against the plain network in float32, over `length` positions of 2 layers.

    With a bf16 cache of `count` sequences, else of one.
    """
    config = replace(resolve_model(name), num_layers=2)
    model = random_model(config, precision, zeros)
    ids = torch.randint(0, config.vocab_size, (count, length), device="cuda")
    step = start(model, kv, 0, length, count)
    compile_side_by_side(step.run)
    rows = []
    for position in range(length):
        token = ids[:, position].contiguous()
        step.buffers.input_ids.copy_(token)
        rows.append(step.run().clone())
        advance(step.buffers, token, torch.zeros_like(token), BLOCK_SIZE)
    plain = in_float32(model, config)
    got = torch.stack(rows, 1).flatten(0, 1)
    result: dict[str, Any] = {"model": name, "precision": precision, "kv_cache": kv, "sequences": count}
    with torch.inference_mode():
        expected = plain.logits(plain.forward_full(ids)).flatten(0, 1)
        result |= compared(got, expected)
        if kv == "int8":
            stored = StoredContext(step.cache, step.buffers.block_tables[0], length)
            same_cache = reference_logits(plain, ids[0].tolist(), stored)
            result |= {f"{key}_of_the_cache": value for key, value in compared(got, same_cache).items()}
    return result


def compared(got: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    error = float((got - expected).norm() / expected.norm())
    return {"relative_error": error, "same_greedy": float((got.argmax(-1) == expected.argmax(-1)).float().mean())}


def shortened(
    name: str, precision: str, kv: str, context: int, tokens: int, batch: int
) -> tuple[str, str, str, int, int, int]:
    """The run with its 256 tokens in the middle, so that it reads as much of the cache a token."""
    less = max(0, tokens - 256)
    return name, precision, kv, context + less // 2, tokens - less, batch


def packed_of(model: Transformer) -> list[BlockedWeight]:
    """The packed weights of the first layer."""
    linears = [model.get_submodule(f"layers.0.{each}") for each in LINEARS]
    return [each.packed for each in linears if isinstance(each, Linear) and isinstance(each.packed, BlockedWeight)]


def changed(without: str) -> dict[str, tuning.Config]:
    """The configs in force with one of their choices undone."""
    return {name: config | {without: 0} for name, config in tuning.in_force().items()}


def indices(given: str, among: Sequence[Any]) -> list[int]:
    """Those that an option names, comma-separated; all where it names none."""
    return [int(i) for i in given.split(",")] if given else list(range(len(among)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", default="", help="indices of RUNS, comma-separated; default: all")
    parser.add_argument("--tuned", type=Path, help="configs to use, a file as in kernels/triton/tuned/")
    parser.add_argument("--checks", default="", help="indices of CHECKS, comma-separated; default: all")
    parser.add_argument("--no-checks", action="store_true")
    parser.add_argument("--no-repeats", action="store_true", help="of runs without one of the choices")
    parser.add_argument("--zeros", action="store_true", help="integer weights have zeros of their own, as AWQ's")
    parser.add_argument("--short", action="store_true", help="decode 256 tokens about the same mean context")
    parser.add_argument("--seconds", type=float, default=115, help="no run is begun after these")
    options = parser.parse_args()
    need_gpu()
    began = time.perf_counter()
    torch.manual_seed(0)
    if options.tuned:
        tuning.put_in_force(json.loads(options.tuned.read_text())["configs"])
    limits = device_limits()
    torch.cuda.empty_cache()
    chosen = indices(options.runs, RUNS)
    checks: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    failures: list[str] = []

    def attempt(into: list[dict[str, Any]], what: Any, *arguments: Any, **also: Any) -> None:
        """A part that fails is told and does not end the run."""
        if time.perf_counter() - began > options.seconds:
            failures.append(f"no time: {arguments}")
            return
        try:
            into.append(what(*arguments) | also)
            print({k: v for k, v in into[-1].items() if k != "kernels_us"}, flush=True)
        except Exception as error:
            failures.append(f"{arguments}: {type(error).__name__}: {error}"[:300])
            traceback.print_exc()

    for i in [] if options.no_checks else indices(options.checks, CHECKS):
        attempt(checks, check, *CHECKS[i], options.zeros)
    for i in chosen:
        attempt(results, run, *(shortened(*RUNS[i]) if options.short else RUNS[i]), limits["read"], options.zeros)
    best = tuning.in_force()
    for i, without in WITHOUT[:0] if options.no_repeats else WITHOUT:
        if i in chosen:
            tuning.put_in_force(changed(without))
            attempt(results, run, *RUNS[i], limits["read"], without=without)
            tuning.put_in_force(best)
    record = record_head("gpu decode") | {
        "limits": limits,
        "checks": checks,
        "runs": results,
        "failures": failures,
        "seconds": time.perf_counter() - began,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu-decode.json").write_text(json.dumps(record, indent=1) + "\n")
    for r in [each for each in results if "kernels_us" in each][:3]:
        largest = sorted(r["kernels_us"].items(), key=lambda entry: -float(entry[1][1]))[:8]
        print(r["model"], r["precision"], {name[:30]: value for name, value in largest})
    show(checks, results)
    print(f"{time.perf_counter() - began:.0f} s in all; failures: {failures}")


def show(checks: list[dict[str, Any]], results: list[dict[str, Any]]) -> None:
    for c in checks:
        own = c.get("relative_error_of_the_cache", c["relative_error"])
        print(
            f"{c['model']:10} {c['precision']} kv {c['kv_cache']} error {c['relative_error']:.1e}, of the kernels "
            f"{own:.1e} ({'within' if own <= 1e-2 else 'ABOVE'} 1e-2)"
        )
    for r in results:
        print(
            f"{r['model']:10} {r['precision']} kv {r['kv_cache']} {r['context']}+{r['tokens']} x{r['batch']:<3} "
            f"{r['tokens_per_s']:8.1f} tokens/s {r['share']:5.1%} of {r['limit_tokens_per_s']:.0f}; "
            f"{r['ms_per_step']:.3f} ms; GB: weights {r['weight_bytes'] / 1e9:.2f} cache {r['cache_bytes'] / 1e9:.2f} "
            f"reserved {r['reserved'] / 1e9:.2f}{' without ' + r['without'] if 'without' in r else ''}"
        )


if __name__ == "__main__":
    main()
