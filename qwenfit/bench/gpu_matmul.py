"""The best launch parameters of int_matmul on this GPU: `python -m qwenfit.bench.gpu_matmul --out FOLDER`.

For each shape a few configs are timed beside unpacking the weight for cuBLAS and beside bf16 weights; processes of
their own compile them first. The best are in FOLDER/tuned-matmul.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from qwenfit.bench.gpu_common import DEVICE, Figures, relative_error
from qwenfit.bench.gpu_kernels import copies, random_blocked, time_us
from qwenfit.kernels.triton import tuning
from qwenfit.kernels.triton.int_matmul import dequantised, int_matmul

COMPILERS = 12
MATMUL_SHAPES = [(4096, 12288), (4096, 22016), (11008, 4096)]
MATMUL_ROWS = (16, 64, 128)


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
    return linear(x, dequantised(weight, x.dtype))


def compile_beforehand(seconds: float) -> None:
    """Compile in processes of their own what `search_matmul` will time."""
    command = [sys.executable, "-m", "qwenfit.bench.gpu_matmul", "--compile"]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    for compiler in [subprocess.Popen([*command, f"{i}/{COMPILERS}"], **quiet) for i in range(COMPILERS)]:
        try:
            compiler.wait(seconds)
        except subprocess.TimeoutExpired:
            compiler.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the record and the configs")
    parser.add_argument("--compile", metavar="I/N", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.compile:
        search_matmul(options.compile)
        return
    compile_beforehand(60)
    found = search_matmul()
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu-matmul.json").write_text(json.dumps(found, indent=1) + "\n")
    tables = {"cards": [torch.cuda.get_device_name()], "configs": found["configs"]}
    (options.out / "tuned-matmul.json").write_text(tuning.as_text(tables))
    for row in found["rows"]:
        print(
            f"int{row['bits']} {row['shape']:14} x{row['rows']:<4} {row['us']:7.1f} us, unpacked "
            f"{row['unpack_us']:7.1f}, bf16 {row['bf16_us_cached']:7.1f} us, error {row['error']:.1e} {row['config']}"
        )


if __name__ == "__main__":
    main()
