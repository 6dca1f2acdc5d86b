"""The best launch parameters of int_matmul on this GPU: `python -m qwenfit.bench.gpu_matmul --out FOLDER`.

For each shape and number of rows a few configs are timed, beside the matrix-vector kernel, unpacking the weight for
cuBLAS, and bf16 weights; every launch reads weights that no cache holds. Processes of their own compile first. The best
configs are in FOLDER/tuned-matmul.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from qwenfit.bench.gpu_common import DEVICE, GPU, Figures, need_gpu, relative_error
from qwenfit.bench.gpu_kernels import SHAPES, copies, empty_blocked, random_blocked, random_plain, time_us
from qwenfit.kernels.triton import tuning
from qwenfit.kernels.triton.arrange import arrange
from qwenfit.kernels.triton.dequantise import dequantised
from qwenfit.kernels.triton.int_matmul import int_matmul, int_matmul_reference
from qwenfit.kernels.triton.int_matvec import MAX_ROWS, BlockedWeight, int_matvec

COMPILERS = 14
ROWS = (3, 4, 8, 16, 32, 64, 128, 256)
TILES = {  # rows of x in a tile -> rows of the weight, warps, stages, unroll, and whether x is in floats
    16: ((64, 4, 4, 1, 0), (64, 4, 4, 2, 0), (64, 4, 6, 1, 0), (64, 4, 6, 2, 0), (128, 4, 4, 1, 0), (128, 8, 4, 1, 0),
         (128, 8, 4, 2, 0)),
    32: ((64, 4, 3, 1, 0), (64, 4, 4, 1, 0), (64, 4, 4, 2, 0), (128, 8, 3, 1, 0), (128, 8, 4, 1, 0), (128, 8, 4, 2, 0)),
    64: ((64, 4, 3, 1, 0), (64, 4, 4, 1, 0), (128, 8, 3, 1, 0), (128, 8, 4, 1, 0), (64, 4, 3, 1, 1), (64, 4, 4, 1, 1),
         (128, 8, 3, 1, 1)),
    128: ((64, 4, 3, 1, 1), (128, 8, 3, 1, 1)),
}  # fmt: skip


def matmul_configs(out: int, rows: int) -> Iterable[dict[str, int]]:
    """Splits make half a program to four for a core."""
    m = min(128, max(16, 1 << (rows - 1).bit_length()))
    cores = torch.cuda.get_device_properties().multi_processor_count if GPU else 1
    for tile, warps, stages, unroll, floats in TILES[m]:
        tiles = -(-out // tile) * -(-rows // m)
        for splits in (1, 2, 4, 8):
            if (splits == 1 or splits * tiles <= 4 * cores) and (splits == 8 or 2 * splits * tiles > cores):
                yield {
                    "m": m, "rows": tile, "warps": warps, "stages": stages, "unroll": unroll, "splits": splits,
                    "floats": floats,
                }  # fmt: skip


def time_shape(bits: int, inputs: int, out: int, seconds: float) -> list[Figures]:
    """One line for each of ROWS; none is begun after `seconds`."""
    began = time.perf_counter()
    weights: list[BlockedWeight] = copies(partial(random_blocked, bits, inputs, out), inputs * out * bits // 8)
    plain = copies(partial(random_plain, inputs, out), inputs * out * 2)
    lines = []
    for rows in ROWS:
        if time.perf_counter() - began > seconds:
            break
        x = torch.randn(rows, inputs, device=DEVICE, dtype=torch.bfloat16)
        arranged = {floats: arrange(x, weights[0], integers=not floats) for floats in (0, 1)}
        timed: list[tuple[float, dict[str, int]]] = []
        for config in matmul_configs(out, rows):
            try:
                own = arranged[config["floats"]]
                y = int_matmul(own, weights[0], config=config)
                run: list[Callable[[], object]] = [
                    partial(int_matmul, own, one, None, None, x.dtype, y, config) for one in weights
                ]
                timed.append((time_us(run), config))
            except Exception as failure:  # a config may want more shared memory than there is
                print(bits, inputs, out, config, repr(failure)[:200], flush=True)
        us, config = min(timed, key=lambda pair: pair[0])
        out_of: dict[str, list[Callable[[], object]]] = {
            "arrange": [partial(arrange, x, one) for one in weights],
            "unpack": [partial(_unpack_and_multiply, x, one) for one in weights],
            "bf16": [partial(linear, x, one) for one in plain],
        }
        if rows <= MAX_ROWS:
            out_of["matvec"] = [partial(int_matvec, x, one) for one in weights]
        got = int_matmul(
            arranged[config["floats"]], weights[0], None, None, x.dtype, torch.full_like(y, torch.nan), config
        )
        line = {
            "bits": bits, "shape": f"{inputs}->{out}", "rows": rows, "us": us, "config": config,
            "gb_s": weights[0].nbytes / us / 1e3, "error": relative_error(got, int_matmul_reference(x, weights[0])),
            "all": [(round(each, 2), used) for each, used in sorted(timed, key=lambda pair: pair[0])],
            **{f"{name}_us": time_us(launches) for name, launches in out_of.items()},
        }  # fmt: skip
        lines.append(line)
        print(_text(line), flush=True)
    return lines


def _unpack_and_multiply(x: torch.Tensor, weight: BlockedWeight) -> torch.Tensor:
    return linear(x, dequantised(weight, x.dtype))


def shapes_of(models: str) -> list[tuple[int, int]]:
    return [(inputs, out) for model in models.split(",") for inputs, out, *_ in SHAPES[model]]


def compile_part(models: str, bits: list[int], part: int) -> None:
    """Compile every COMPILERS-th of what will be timed, for the cache on disk."""
    seen = 0
    for width in bits:
        for inputs, out in shapes_of(models):
            weight = empty_blocked(width, inputs, out)
            for rows in (16, 32, 64, 128):
                for config in matmul_configs(out, rows):
                    seen += 1
                    if seen % COMPILERS == part:
                        try:
                            x = torch.ones(rows, inputs, device=DEVICE, dtype=torch.bfloat16)
                            int_matmul(arrange(x, weight, integers=not config["floats"]), weight, config=config)
                        except Exception:  # told when it is timed
                            traceback.print_exc()


def compile_beforehand(arguments: list[str], seconds: float) -> float:
    """Seconds that it took. A process that fails or is late costs time only."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "qwenfit.bench.gpu_matmul", *arguments]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for process in [subprocess.Popen([*command, "--compile", str(i)], **quiet) for i in range(COMPILERS)]:
        try:
            process.wait(max(0.1, seconds - (time.perf_counter() - began)))
        except subprocess.TimeoutExpired:
            process.kill()
    return time.perf_counter() - began


def _text(line: Figures) -> str:
    others = " ".join(f"{name[:-3]} {line[name]:.1f}" for name in line if name.endswith("_us"))
    config = " ".join(f"{name}={value}" for name, value in line["config"].items())
    return (
        f"int{line['bits']} {line['shape']:13} x{line['rows']:<3} {line['us']:6.1f} us {line['gb_s']:5.0f} GB/s; "
        f"{others}; error {line['error']:.0e} {config}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the record and the configs")
    parser.add_argument("--models", default="Qwen-7B", help="whose shapes")
    parser.add_argument("--bits", default="4,8")
    parser.add_argument("--seconds", type=float, default=100)
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    need_gpu()
    torch.manual_seed(0)
    bits = [int(each) for each in options.bits.split(",")]
    if options.compile is not None:
        compile_part(options.models, bits, options.compile)
        return
    began = time.perf_counter()
    arguments = ["--models", options.models, "--bits", options.bits]
    compiling = compile_beforehand(arguments, 0.5 * options.seconds)
    lines: list[Figures] = []
    for width in bits:
        for inputs, out in shapes_of(options.models):
            left = options.seconds - (time.perf_counter() - began)
            try:
                lines += time_shape(width, inputs, out, left)
            except Exception:
                traceback.print_exc()
            torch.cuda.empty_cache()
    options.out.mkdir(parents=True, exist_ok=True)
    best = {
        tuning.key("int_matmul", (line["bits"], *map(int, line["shape"].split("->")), line["rows"])): line["config"]
        for line in lines
    }
    record = {
        "kind": "gpu int_matmul", "hardware": torch.cuda.get_device_name(), "torch": torch.__version__,
        "command": "python -m qwenfit.bench.gpu_matmul " + " ".join(sys.argv[1:]), "compiling_s": compiling,
        "rows": lines,
    }  # fmt: skip
    (options.out / "gpu-matmul.json").write_text(json.dumps(record, indent=1) + "\n")
    tables = {"cards": [torch.cuda.get_device_name()], "configs": tuning.in_force() | best}
    (options.out / "tuned-matmul.json").write_text(tuning.as_text(tables))
    print(f"{compiling:.0f} s compiling, {time.perf_counter() - began:.0f} s in all")
    print("\n".join(map(_text, lines)))


if __name__ == "__main__":
    main()
