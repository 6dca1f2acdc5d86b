"""The best layouts of the Hopper's product of many rows: `python -m qwenfit.bench.gpu_product --out FOLDER`.

Each shape and number of rows is timed in some layouts, beside the vendor's library with what the kernel does besides
(the gate, the sum with the residual, the bias); every launch reads weights that no cache holds. Then whole steps of a
few layers: by the vendor's library, as it is, and with the kernel beside attention too.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn.functional import linear

from qwenfit.bench.gpu_common import Figures, need_gpu, record_head, relative_error
from qwenfit.bench.gpu_decode import random_model, start
from qwenfit.bench.gpu_kernels import SHAPES, copies, random_plain, time_us
from qwenfit.bench.gpu_search import REPLAYS, milliseconds, shortened
from qwenfit.checkpoint.resolve import resolve_model
from qwenfit.kernels.hopper import product
from qwenfit.kernels.hopper.product import LEAST_COLUMNS, MOST_COLUMNS, Layout, hopper_product, room_for
from qwenfit.kernels.triton.gate import silu_mul
from qwenfit.kernels.triton.launch import device_limits
from qwenfit.kernels.triton.product import product as any_product
from qwenfit.kernels.wide import add_product
from qwenfit.model import decode

ROWS = (48, 64, 96, 128, 160, 192)


def layouts(rows: int, inputs: int, out: int, gated: bool, cores: int) -> Iterable[Layout]:
    """Those that fill the card once, twice or three times."""
    step, seen = 16 if gated else 8, set()
    for programs, splits in itertools.product((cores, 120, 2 * cores, 3 * cores), (1,) if gated else (1, 2, 3, 4)):
        if inputs // 64 < 4 * splits or splits * programs > 4 * cores:
            continue
        columns = max(LEAST_COLUMNS, -(-out * splits // (programs * step)) * step)
        layout = Layout(room_for(rows), columns, splits)
        fits = splits == 1 or 256 * layout.groups * (columns + 8) <= layout.shared
        if columns <= MOST_COLUMNS[gated][layout.groups - 1] and fits and layout not in seen:
            seen.add(layout)
            yield layout


def time_shape(shape: tuple[int, int, bool, bool, bool], rows: int) -> Figures:
    inputs, out, gated, _, added = shape
    outputs = out // 2 if gated else out
    weights = copies(partial(random_plain, inputs, out), inputs * out * 2)
    weights = weights * max(1, 24 // len(weights))
    x = torch.randn(rows, inputs, device="cuda", dtype=torch.bfloat16)
    bias = None if gated or added else torch.randn(out, device="cuda", dtype=torch.bfloat16)
    total = torch.randn(rows, outputs, device="cuda") if added else None
    exact = linear(x.float(), weights[0].float(), None if bias is None else bias.float())
    if gated:
        exact = torch.nn.functional.silu(exact[:, :outputs]) * exact[:, outputs:]
    y = torch.empty(rows, outputs, device="cuda", dtype=torch.bfloat16)

    def vendor(weight: torch.Tensor) -> object:
        if total is not None:
            return add_product(total, x, weight)
        both = linear(x, weight, bias)
        return silu_mul(both) if gated else both

    cores = torch.cuda.get_device_properties().multi_processor_count
    tried = list(layouts(rows, inputs, out, gated, cores))
    with ThreadPoolExecutor(16) as pool:  # compiles
        for layout in tried:
            pool.submit(product._kernel, layout, gated, added, added, bias is not None, True, x.device)
    timed: list[tuple[float, Layout]] = []
    errors = []
    for layout in tried:
        try:
            if total is not None:
                got = hopper_product(x, weights[0], residual=torch.ones_like(total), layout=layout) - 1
            else:
                got = hopper_product(x, weights[0], bias, None, gated, None, y.fill_(torch.nan), layout)
            errors.append(relative_error(got, exact))
            if not errors[-1] < 1e-2:
                print("WRONG", shape, rows, layout, errors[-1], flush=True)
                continue
            run: list[Callable[[], object]] = [
                partial(hopper_product, x, one, bias, total, gated, None, None if added else y, layout)
                for one in weights
            ]
            timed.append((time_us(run), layout))
        except Exception as failure:
            print(shape, rows, layout, repr(failure)[:200], flush=True)
    timed.sort(key=lambda pair: pair[0])
    theirs = time_us([partial(vendor, one) for one in weights])
    if not timed:
        return {"shape": f"{inputs}->{out}", "rows": rows, "vendor_us": theirs}
    us, layout = timed[0]
    return {
        "shape": f"{inputs}->{out}", "gated": gated, "rows": rows, "us": us, "vendor_us": theirs,
        "layout": astuple(layout),
        "gb_s": weights[0].nbytes / us / 1e3, "tflops": 2e-6 * rows * inputs * out / us, "error": max(errors),
        "all": [(round(each, 2), astuple(used)) for each, used in timed],
    }  # fmt: skip


def time_steps(name: str, rows: Iterable[int], contexts: Iterable[int], kv: str) -> list[Figures]:
    """Milliseconds of a decoding step with bfloat16 weights in three ways: the better of two, in turn."""
    config = shortened(resolve_model(name), "bf16")
    model = random_model(config, "bf16")
    lines = []
    for context, batch in itertools.product(contexts, rows):
        step = start(model, kv, context, 4 * REPLAYS, batch)
        times: dict[str, list[float]] = {way: [] for way in WAYS}
        for way in [*WAYS] * 2:
            with WAYS[way]():
                times[way].append(milliseconds(step))
        best = {way: min(each) for way, each in times.items()}
        about = {"model": name, "layers": config.num_layers, "kv_cache": kv, "sequences": batch, "context": context}
        lines.append(about | best)
        print(f"{name} {kv} x{batch} {context}: " + " ".join(f"{way} {ms:.4f}" for way, ms in best.items()), flush=True)
        del step
    return lines


def by_vendor() -> contextlib.AbstractContextManager[object]:
    """The kernel is not taken."""
    return patch.object(product, "why_not", lambda _: "not now")


def everywhere() -> contextlib.AbstractContextManager[object]:
    """The kernel is taken beside attention too."""
    return patch.object(
        decode, "product", lambda *given, near_attention=False, **named: any_product(*given, **named)
    )  # fmt: skip


WAYS: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "vendor_ms": by_vendor, "ms": contextlib.nullcontext, "everywhere_ms": everywhere,
}  # fmt: skip


def _text(line: Figures) -> str:
    if "us" not in line:
        return f"{line['shape']:13} x{line['rows']:<4} none; vendor {line['vendor_us']:.1f}"
    return (
        f"{line['shape']:13} x{line['rows']:<4} {line['us']:7.1f} us, vendor {line['vendor_us']:7.1f} "
        f"({line['us'] / line['vendor_us'] - 1:+.0%}) {line['gb_s']:5.0f} GB/s {line['tflops']:4.0f} TFLOP/s "
        f"error {line['error']:.0e} {line['layout']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the record")
    parser.add_argument("--models", default="Qwen-7B", help="whose shapes")
    parser.add_argument("--steps", default="", metavar="MODELS", help="whose steps")
    parser.add_argument("--contexts", default="100", help="tokens of the steps' sequences")
    parser.add_argument("--kv-caches", default="bf16", help="of the steps: bf16, int8")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    need_gpu()
    torch.manual_seed(0)
    began = time.perf_counter()
    lines: list[Figures] = []
    sizes = [int(rows) for rows in options.rows.split(",")]
    for rows in sizes:
        for model in filter(None, options.models.split(",")):
            for shape in SHAPES[model]:
                if time.perf_counter() - began > options.seconds:
                    break
                try:
                    lines.append(time_shape(shape, rows))
                    print(_text(lines[-1]), flush=True)
                except Exception:
                    traceback.print_exc()
                torch.cuda.empty_cache()
    contexts = [int(context) for context in options.contexts.split(",")]
    steps = [
        line
        for model in filter(None, options.steps.split(","))
        for kv in options.kv_caches.split(",")
        for line in time_steps(model, sizes, contexts, kv)
    ]
    options.out.mkdir(parents=True, exist_ok=True)
    record = {**record_head("gpu product"), "limits": device_limits(), "rows": lines, "steps": steps}
    (options.out / "gpu-product.json").write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(map(_text, lines)))


if __name__ == "__main__":
    main()
