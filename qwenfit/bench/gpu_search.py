"""Search a model's launch parameters in whole decoding steps: `python -m qwenfit.bench.gpu_search --out FOLDER`.

In a step a kernel begins beside the one before it, in the registers that are left, and its weights are asked for while
that one ends. What is best there is not what is best in a row of one kernel, which gpu_kernels.py times. So one kernel
after the other tries its configs in a recorded step, and keeps the best before the next one begins: in a step of a few
layers, whose weights no cache holds, and a small head. At the end whole steps are timed, as it was and as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwenfit.bench.gpu_common import need_gpu, record_head
from qwenfit.bench.gpu_decode import LINEARS, packed_of, random_model, record_graph, start, unmoved
from qwenfit.bench.gpu_kernels import (
    attention_configs,
    bf16_configs,
    compile_beside,
    group_configs,
    int_configs,
    once_each,
)
from qwenfit.bench.gpu_matmul import matmul_configs
from qwenfit.checkpoint.resolve import resolve_model
from qwenfit.config import ModelConfig
from qwenfit.kernels.choice import INT_LANES_ROWS, INT_MATVEC_ROWS, TILES_ROWS
from qwenfit.kernels.triton import tuning
from qwenfit.kernels.triton.launch import best_seconds, compile_side_by_side, device_limits
from qwenfit.model.decode import DecodeStep
from qwenfit.model.transformer import Transformer

REPLAYS = 60
KEPT = 24  # configs of each kernel that a record keeps
GAIN = 0.997  # of the time: what is less is noise
WEIGHTS = 600e6  # bytes of the layers that a searched step reads: ten times a card's second-level cache
VOCABULARY = 8192
ATTENTION = ("decode_heads", "decode_attention")
FAR = 8  # times the context, at which attention is tried too
Trials = list[tuple[str, tuple[int, ...], list[tuning.Config]]]


def shortened(config: ModelConfig, precision: str) -> ModelConfig:
    """The model with as many layers as make WEIGHTS, four at least, and a small vocabulary."""
    one = Transformer(replace(config, num_layers=1), torch.bfloat16, "meta").layers[0]
    bits = {"int4": 4.25, "int8": 8.25, "bf16": 16}[precision]
    layers = max(4, math.ceil(WEIGHTS / (sum(p.numel() for p in one.parameters()) * bits / 8)))
    return replace(config, num_layers=min(config.num_layers, layers), vocab_size=VOCABULARY)


def trials(model: Transformer, precision: str, kv: str, rows: int) -> Trials:
    """The kernels of a step of `rows` sequences, each with its shape and the configs to try; the largest first."""
    config = model.config
    found: Trials = []
    if precision != "bf16":
        for packed in sorted(packed_of(model), key=lambda packed: -packed.nbytes):
            found.append(int_trial(packed.bits, packed.in_features, packed.out_features, rows, config))
    elif rows <= TILES_ROWS[1]:
        for name in LINEARS:
            weight = model.get_parameter(f"layers.0.{name}.weight")
            out, inputs = weight.shape
            gated = name.endswith("gate_up_proj")
            if rows >= TILES_ROWS[0]:
                found.append(("bf16_tiles", (int(gated), inputs, out, rows), list(tiles_configs(gated))))
            else:
                found.append(("bf16_matvec", (inputs, out, rows), list(bf16_configs(rows))))
    size, groups = 1 if kv == "int8" else 2, config.num_heads // config.num_kv_heads
    if groups == 1:
        shape = (size, config.head_dim, config.num_heads * rows)
        found.append(("decode_heads", shape, list(attention_configs(kv == "int8", rows))))
    else:
        found.append(("decode_attention", (size, config.head_dim, groups, rows), list(group_configs(rows))))
    return found


def int_trial(
    bits: int, inputs: int, out: int, rows: int, config: ModelConfig
) -> tuple[str, tuple[int, ...], list[tuning.Config]]:
    """What multiplies an int4 or int8 weight with so many rows, its shape, and the configs to try."""
    if rows <= INT_MATVEC_ROWS:
        return "int_matvec", (bits, inputs, out, rows), list(int_configs(bits, inputs, out, rows))
    if bits == 4 and rows <= INT_LANES_ROWS:
        gated = out == 2 * config.intermediate_size
        return "int_lanes", (int(gated), inputs, out, rows), list(lanes_configs(inputs))
    return "int_matmul", (bits, inputs, out, rows), list(matmul_configs(out, rows))


def lanes_configs(inputs: int) -> Iterable[tuning.Config]:
    for tiles in (2, 4):
        for warps in (1, 2, 4, 8):
            if warps <= max(1, inputs // 512):
                yield from ({"tiles": tiles, "warps": warps, "ahead": ahead} for ahead in (1, 2))


def tiles_configs(gated: bool) -> Iterable[tuning.Config]:
    for tile in (64, 128):
        for columns in (64, 128):
            for splits in (1,) if gated else (1, 2, 3, 4):
                for beside in (1, 2):
                    yield {"rows": tile, "columns": columns, "splits": splits, "warps": 4, "beside": beside}


def milliseconds(step: DecodeStep) -> float:
    """The time of the step as the configs in force make it; leaves the step as it was."""
    with unmoved(step):
        graph = record_graph(step)

        def replays() -> None:
            for _ in range(REPLAYS // 3):
                graph.replay()

        return best_seconds(replays, 3) * 1e3 / (REPLAYS // 3)


def search(step: DecodeStep, kernels: Trials, seconds: float, far: DecodeStep | None = None) -> dict[str, Any]:
    """Try each kernel's configs in turn, and then once more the ten that were best of each; keep what is best.

    Attention's are tried in `far` too, a step with a longer context: in how many parts it is cut is for both.
    """
    until = time.perf_counter() + seconds
    first = milliseconds(step)
    at_both = {kernel: [step, far] if far is not None and kernel in ATTENTION else [step] for kernel, *_ in kernels}
    found: dict[str, tuning.Config] = {}
    tried: dict[str, list[tuple[float, tuning.Config]]] = {}
    once: dict[str, list[tuple[float, tuning.Config]]] = {}  # of the first round, in which the others are as they were
    for _ in range(2):
        for kernel, shape, configs in kernels:
            key, mine = tuning.key(kernel, shape), tuning.tuned(kernel, shape)
            best = sum(map(milliseconds, at_both[kernel]))
            again = sorted(tried.get(key, []), key=lambda trial: trial[0])[:10]
            tried.setdefault(key, [])
            for config in [config for _, config in again] or configs:
                if time.perf_counter() > until:
                    break
                tuning.put_in_force({key: config})
                try:
                    took = sum(map(milliseconds, at_both[kernel]))
                except RuntimeError as error:  # of which a GPU does not recover
                    raise SystemExit(f"{kernel} {shape} {config}: {error}") from None
                tried[key].append((took, config))
                if took < GAIN * best:
                    best, mine, found[key] = took, config, config
            tuning.put_in_force({key: mine})
            once.setdefault(key, list(tried[key]))
    kept = {
        key: {"tried": len(trials), "best": sorted(trials, key=lambda trial: trial[0])[:KEPT]}
        for key, trials in once.items()
    }
    return {"short_ms_before": first, "short_ms": milliseconds(step), "found": found, "trials": kept}


def compile_all(step: DecodeStep, kernels: Trials, share: str) -> None:
    """Compile one share of the configs, for the cache on disk, and run none."""
    part, parts = map(int, share.split("/"))
    work = [(kernel, shape, config) for kernel, shape, configs in kernels for config in once_each(configs)]

    def launch_each() -> None:
        for kernel, shape, config in work[part::parts]:
            tuning.put_in_force({tuning.key(kernel, shape): config})
            with contextlib.suppress(Exception):  # met again where it is tried
                step.run(layers=1)

    compile_side_by_side(launch_each)


def keep(path: Path, found: dict[str, tuning.Config]) -> None:
    """Write what was found on this card, with what the file holds of it already."""
    card = torch.cuda.get_device_name()
    before = json.loads(path.read_text()) if path.exists() else {}
    kept = before["configs"] if before.get("cards") == [card] else {}
    path.write_text(tuning.as_text({"cards": [card], "configs": kept | found}))


def whole_step(config: ModelConfig, options: argparse.Namespace) -> DecodeStep:
    model = random_model(config, options.precision)
    return start(model, options.kv_cache, options.context, 4 * REPLAYS, options.sequences)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record and the configs")
    parser.add_argument("--model", default="Qwen-1.8B")
    parser.add_argument("--precision", default="int4", choices=("int4", "int8", "bf16"))
    parser.add_argument("--kv-cache", default="bf16")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=100, help="in all")
    parser.add_argument("--kernels", default="", help="names of those to search, comma-separated; default: all")
    parser.add_argument("--tuned", type=Path, help="configs to begin with, a file as in kernels/triton/tuned/")
    parser.add_argument("--compile", metavar="I/N", help="only compile the I-th of N shares of what would be tried")
    parser.add_argument("--compile-only", action="store_true", help="for a later run, beside another one")
    parser.add_argument("--no-compile", action="store_true", help="has been done")
    options = parser.parse_args()
    need_gpu()
    began = time.perf_counter()
    torch.manual_seed(0)
    if options.tuned:
        tuning.put_in_force(json.loads(options.tuned.read_text())["configs"])
    if not options.compile and not options.no_compile:
        arguments = [argument for argument in sys.argv[1:] if argument != "--compile-only"]
        compile_beside("gpu_search", arguments, options.seconds * 0.55, processes=3)
    if options.compile_only:
        return
    compiled = time.perf_counter() - began
    config = resolve_model(options.model)
    short = shortened(config, options.precision)
    step = whole_step(replace(short, num_layers=1) if options.compile else short, options)
    kernels = trials(step.model, options.precision, options.kv_cache, options.sequences)
    if options.kernels:
        names = {name for name, *_ in kernels}
        wanted = options.kernels.split(",")
        if unknown := [name for name in wanted if name not in names]:
            parser.error(f"--kernels {unknown[0]}: such a step takes {', '.join(sorted(names))}")
        kernels = [trial for trial in kernels if trial[0] in wanted]
    if options.compile:
        compile_all(step, kernels, options.compile)
        return
    before = tuning.in_force()
    far = None
    if options.sequences == 1:
        far = start(step.model, options.kv_cache, FAR * options.context, 4 * REPLAYS, 1)
    result = search(step, kernels, options.seconds - compiled, far)
    options.out.mkdir(parents=True, exist_ok=True)
    keep(options.out / "tuned.json", result["found"])
    del step, far
    step = whole_step(config, options)
    tuning.replace_all(before)
    first = milliseconds(step)
    tuning.put_in_force(result["found"])
    record = record_head("gpu search") | {
        "limits": device_limits(),
        "model": options.model,
        "precision": options.precision,
        "kv_cache": options.kv_cache,
        "context": options.context,
        "context_of_attention_too": FAR * options.context if options.sequences == 1 else None,
        "sequences": options.sequences,
        "layers": short.num_layers,
        "ms_before": first,
        "ms": milliseconds(step),
        **result,
        "seconds": {"compiling": compiled, "all": time.perf_counter() - began},
    }
    (options.out / "gpu-search.json").write_text(json.dumps(record, indent=1) + "\n")
    what = f"{options.model} {options.precision} x {options.sequences}"
    print(f"QWENFIT_TUNED={options.out} takes what was found.")
    print(f"{what}: {record['ms_before']:.4f} -> {record['ms']:.4f} ms; ", end="")
    print(f"{compiled:.0f} s compiling, {time.perf_counter() - began:.0f} s in all")
    for key, config in result["found"].items():
        tried = result["trials"][key]
        print(key, config, "of", tried["tried"], "from", round(tried["best"][0][0], 4))


if __name__ == "__main__":
    main()
