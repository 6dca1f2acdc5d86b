"""Search a model's launch parameters in whole decoding steps: `python -m qwenfit.bench.gpu_search --out FOLDER`.

In a step a kernel begins beside the one before it, in the registers that are left, and its weights are asked for while
that one ends. What is best there is not what is best in a row of one kernel, which gpu_kernels.py times. So one kernel
after the other tries its configs in a recorded step, and keeps the best before the next one begins.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qwenfit.bench.gpu_common import need_gpu, record_head
from qwenfit.bench.gpu_decode import LINEARS, packed_of, random_model, record_graph, start, unmoved
from qwenfit.bench.gpu_kernels import attention_configs, compile_beside, group_configs, int_configs, once_each
from qwenfit.bench.gpu_matmul import matmul_configs
from qwenfit.checkpoint.resolve import resolve_model
from qwenfit.config import ModelConfig
from qwenfit.kernels.choice import INT_LANES_ROWS, INT_MATVEC_ROWS, TILES_ROWS
from qwenfit.kernels.triton import tuning
from qwenfit.kernels.triton.launch import best_seconds, device_limits
from qwenfit.model.decode import DecodeStep
from qwenfit.model.transformer import Transformer

REPLAYS = 60
GAIN = 0.997  # of the time: what is less is noise
Trials = list[tuple[str, tuple[int, ...], list[tuning.Config]]]


def trials(model: Transformer, precision: str, kv: str, rows: int) -> Trials:
    """The kernels of a step of `rows` sequences, each with its shape and the configs to try; the largest first.

    Attention is tried for one sequence alone.
    """
    config = model.config
    found: Trials = []
    if precision != "bf16":
        for packed in sorted(packed_of(model), key=lambda packed: -packed.nbytes):
            found.append(int_trial(packed.bits, packed.in_features, packed.out_features, rows, config))
    elif TILES_ROWS[0] <= rows <= TILES_ROWS[1]:
        for name in LINEARS:
            weight = model.get_parameter(f"layers.0.{name}.weight")
            out, inputs = weight.shape
            gated = name.endswith("gate_up_proj")
            found.append(("bf16_tiles", (int(gated), inputs, out, rows), list(tiles_configs(gated))))
    if rows > 1:
        return found
    size, groups = 1 if kv == "int8" else 2, config.num_heads // config.num_kv_heads
    if groups == 1:
        shape = (size, config.head_dim, config.num_heads)
        found.append(("decode_heads", shape, list(attention_configs(kv == "int8", 1))))
    else:
        found.append(("decode_attention", (size, config.head_dim, groups, 1), list(group_configs(1))))
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


def search(step: DecodeStep, kernels: Trials, seconds: float) -> dict[str, Any]:
    """Try each kernel's configs in turn, and then once more the ten that were best of each; keep what is best."""
    until = time.perf_counter() + seconds
    best = first = milliseconds(step)
    found: dict[str, tuning.Config] = {}
    tried: dict[str, list[tuple[float, tuning.Config]]] = {}
    for _ in range(2):
        for kernel, shape, configs in kernels:
            key, mine = tuning.key(kernel, shape), tuning.tuned(kernel, shape)
            again = sorted(tried.get(key, []), key=lambda trial: trial[0])[:10]
            tried.setdefault(key, [])
            for config in [config for _, config in again] or configs:
                if time.perf_counter() > until:
                    break
                tuning.put_in_force({key: config})
                try:
                    took = milliseconds(step)
                except RuntimeError as error:  # of which a GPU does not recover
                    raise SystemExit(f"{kernel} {shape} {config}: {error}") from None
                tried[key].append((took, config))
                if took < GAIN * best:
                    best, mine, found[key] = took, config, config
            tuning.put_in_force({key: mine})
    return {"ms_before": first, "ms": best, "found": found, "trials": tried}


def compile_all(step: DecodeStep, kernels: Trials, share: str) -> None:
    """Compile one share of the configs, for the cache on disk."""
    part, parts = map(int, share.split("/"))
    work = [(kernel, shape, config) for kernel, shape, configs in kernels for config in once_each(configs)]
    for kernel, shape, config in work[part::parts]:
        tuning.put_in_force({tuning.key(kernel, shape): config})
        step.run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record and the configs")
    parser.add_argument("--model", default="Qwen-1.8B")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--kv-cache", default="bf16")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--sequences", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=100, help="in all")
    parser.add_argument("--tuned", type=Path, help="configs to begin with, a file as in kernels/triton/tuned/")
    parser.add_argument("--compile", metavar="I/N", help="only compile the I-th of N shares of what would be tried")
    options = parser.parse_args()
    need_gpu()
    began = time.perf_counter()
    torch.manual_seed(0)
    if options.tuned:
        tuning.put_in_force(json.loads(options.tuned.read_text())["configs"])
    config = resolve_model(options.model)
    if options.compile:
        config = replace(config, num_layers=1)
    model = random_model(config, options.precision)
    kernels = trials(model, options.precision, options.kv_cache, options.sequences)
    step = start(model, options.kv_cache, options.context, 4 * REPLAYS, options.sequences)
    if options.compile:
        compile_all(step, kernels, options.compile)
        return
    compile_beside("gpu_search", sys.argv[1:], options.seconds * 0.55)
    compiled = time.perf_counter() - began
    result = search(step, kernels, options.seconds - compiled)
    record = record_head("gpu search") | {
        "limits": device_limits(),
        **result,
        "seconds": {"compiling": compiled, "all": time.perf_counter() - began},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu-search.json").write_text(json.dumps(record, indent=1) + "\n")
    tables = {"cards": [torch.cuda.get_device_name()], "configs": tuning.in_force() | result["found"]}
    (options.out / "tuned.json").write_text(tuning.as_text(tables))
    what = f"{options.model} {options.precision} x {options.sequences}"
    print(f"{what}: {result['ms_before']:.4f} -> {result['ms']:.4f} ms; ", end="")
    print(f"{compiled:.0f} s compiling, {time.perf_counter() - began:.0f} s in all")
    for key, config in result["found"].items():
        ordered = sorted(result["trials"][key], key=lambda trial: trial[0])
        print(key, config, "of", len(ordered), "from", round(ordered[0][0], 4), "to", round(ordered[-1][0], 4))


if __name__ == "__main__":
    main()
