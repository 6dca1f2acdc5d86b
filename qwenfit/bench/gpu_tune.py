"""Check and time the trainer on this GPU in one go: `python -m qwenfit.bench.gpu_tune --out FOLDER [--seconds 105]`.

First the tests that need a GPU, then cells of the guide's finetuning table, each with its plan said before it runs, a
profile of one, and last, while time remains, transformers and PEFT. With --kernels also attention by length, and the
fused kernels against the plain path at real sizes. A part that fails is reported and the next one runs. The short
table comes last.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from qwenfit.bench.record import Record, write_record
from qwenfit.bench.tune import Trainee, bench_cell, make_trainee, matmul_rate, measure
from qwenfit.bench.tune_table import HEADER, cell_line, cell_settings, rival_line
from qwenfit.catalog import get_model
from qwenfit.planning.task import Finetune
from qwenfit.tune import forward, loss, optimizer
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.planned import plan_tune

TESTS = ("tests/tune/test_gpu_tune.py",)
TEST_SECONDS = 34.0
CELLS = [  # model, method, length, optimizer, timed iterations
    ("Qwen-7B", "lora", 1024, "fp32", 3),
    ("Qwen-7B", "lora", 256, "fp32", 5),
    ("Qwen-7B", "lora", 4096, "fp32", 1),
    ("Qwen-7B", "lora", 8192, "fp32", 1),
    ("Qwen-7B", "lora", 512, "fp32", 2),
    ("Qwen-7B", "qlora", 1024, "fp32", 3),
    ("Qwen-7B", "qlora", 256, "fp32", 3),
    ("Qwen-7B", "full", 1024, "bf16", 2),
    ("Qwen-1.8B", "full", 1024, "fp32", 2),
    ("Qwen-1.8B", "lora", 1024, "fp32", 2),
    ("Qwen-7B", "lora-emb", 1024, "fp32", 2),
    ("Qwen-7B", "qlora", 4096, "fp32", 1),
    ("Qwen-7B", "lora", 2048, "fp32", 1),
]
PROFILED = "Qwen-7B lora 256"
PEERS = [("Qwen-7B", "lora", 1024)]


class Session:
    """What is found, and how much time is left."""

    def __init__(self, seconds: float) -> None:
        self.started, self.seconds = time.perf_counter(), seconds
        self.found: dict[str, Any] = {"checks": {}, "failed": {}, "cells": [], "peers": []}
        self.records: list[Record] = []

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.started)

    def part(self, name: str, work: Callable[[], Any], needs: float = 0.0) -> Any:
        """Run one part if `needs` seconds are left; whatever it raises is noted."""
        if self.left < needs:
            self.found["failed"][name] = "no time left"
            return None
        try:
            return work()
        except Exception as error:
            self.found["failed"][name] = f"{type(error).__name__}: {error}"[:2000]
            print(f"FAILED {name}: {traceback.format_exc()[-1500:]}", flush=True)
            return None

    def check(self, name: str, work: Callable[[], Any]) -> None:
        began = time.perf_counter()
        result = self.part(name, work, needs=5)
        self.found["checks"][name] = result
        print(f"{name}: {result} ({time.perf_counter() - began:.1f} s)", flush=True)


def run_tests(limit: float) -> str:
    """The end of what pytest says of TESTS, in a process of its own, interrupted after `limit` seconds."""
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--durations=6", "--noconftest", *TESTS]
    paths = {"PYTHONPATH": os.pathsep.join([".", "tests", os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | paths
    )
    try:
        said, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it still says what failed until then
        try:
            said, _ = process.communicate(timeout=4)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
        said += f"\nnot done in {limit:.0f} s"
    return said[-3000:]


def attention_seconds(rows: int, length: int) -> dict[str, float]:
    """Seconds of attention forward and backward in Qwen-7B's shape for each of torch's, and how far they are apart."""
    q, k, v = (
        torch.randn(rows, length, 32, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)
    )
    up = torch.randn_like(q)
    found: dict[str, float] = {}
    results: list[Tensor] = []
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        inputs = [t.detach().requires_grad_() for t in (q, k, v)]
        with sdpa_kernel(backend):
            best = float("inf")
            for _ in range(4):
                torch.cuda.synchronize()
                started = time.perf_counter()
                out = scaled_dot_product_attention(inputs[0], inputs[1], inputs[2], is_causal=True)
                grads = torch.autograd.grad(out, inputs, up)
                torch.cuda.synchronize()
                best = min(best, time.perf_counter() - started)
        found[backend.name] = best
        results += [torch.cat([out.flatten(), *(g.flatten() for g in grads)]).float()]
    found["apart"] = float((results[0] - results[1]).norm() / results[1].norm())
    return found


def fused_against_plain(method: str, precision: str, length: int = 320) -> dict[str, Any]:
    """Losses of five steps on two layers of Qwen-7B's width, with the fused kernels and without."""
    name = "Qwen-7B"
    settings = TuneConfig(
        name, method=method, precision=precision, seq_len=length, grad_accum=3, lora_dropout=0.0, lr=1e-4
    )
    curves, seconds = [], []
    kept = [(module, module.fusible) for module in (forward, loss, optimizer)]
    for plain in (False, True):
        for module, own in kept:
            module.fusible = (lambda device: False) if plain else own  # type: ignore[attr-defined]
        try:
            trainee = make_trainee(settings, replace(get_model(name), num_layers=2), precision, "cuda")
            measured = measure(trainee, settings, 4)
        finally:
            for module, own in kept:
                module.fusible = own  # type: ignore[attr-defined]
        curves.append(measured.losses)
        seconds.append(min(measured.seconds))
    apart = max(abs(a - b) / abs(b) for a, b in zip(*curves, strict=True))
    return {"apart": apart, "first": curves[0][0], "last": curves[0][-1], "fused_s": seconds[0], "plain_s": seconds[1],
            "ok": apart < 2e-3}  # fmt: skip


def profile(trainee: Trainee, settings: TuneConfig) -> dict[str, list[float]]:
    """Kernel -> [launches, milliseconds] of one iteration, the longest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as profiler:
        measure(trainee, settings, 0)
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = {}
    for event in profiler.events():
        entry = totals.setdefault(event.name[:90], [0, 0.0])
        entry[0] += 1
        entry[1] += event.device_time / 1e3
    return dict(sorted(totals.items(), key=lambda item: -item[1][1])[:40])


def run_cells(session: Session, rate: float, out: Path) -> None:
    trainee: Trainee | None = None
    for model, method, length, regime, steps in CELLS:
        settings = cell_settings(model, method, length, regime, device="cuda")
        name = f"{model} {method} {length}"

        def one(settings: TuneConfig = settings, steps: int = steps, name: str = name) -> None:
            nonlocal trainee
            made = plan_tune(replace(settings, force=True))
            seconds = made.speed.seconds_per_iter or 0.0
            print(f"prediction {name}: {seconds:.3f} s, {made.memory.allocated / 1e9:.2f} GB allocated", flush=True)
            if (steps + 2) * seconds + 6 > session.left:
                raise TimeoutError("no time left")
            record, trainee = bench_cell(settings, steps, trainee, rate)
            session.records.append(record)
            write_record(record, out)
            print(cell_line(record), flush=True)

        session.part(name, one, needs=8)
        if name == PROFILED and trainee is not None and session.left > 40:
            work = functools.partial(profile, trainee, settings)
            session.found["profile"] = session.part("profile", work)
        if name in session.found["failed"]:
            trainee = None  # half made, perhaps
            gc.collect()
            torch.cuda.empty_cache()


def run_peers(session: Session) -> None:
    from qwenfit.bench.tune_peers import bench_peers

    for model, method, length in PEERS:
        if session.left > 22:
            results = bench_peers(cell_settings(model, method, length, device="cuda"), 1)
            session.found["peers"] += results
            print("\n".join(map(rival_line, results)), flush=True)


def predictions() -> None:
    for model, method, length, regime, _ in CELLS:
        made = plan_tune(cell_settings(model, method, length, regime, device="cuda", force=True))
        assert isinstance(made.task, Finetune)
        print(
            f"plan {model} {method} {length}: {made.speed.seconds_per_iter:.3f} s, "
            f"{made.memory.allocated / 1e9:.2f} GB allocated, {made.memory.process / 1e9:.2f} GB process"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=105.0)
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--kernels", action="store_true", help="attention by length, fused kernels against plain ones")
    options = parser.parse_args()
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    options.out.mkdir(parents=True, exist_ok=True)
    session = Session(options.seconds)
    session.part("predictions", predictions)
    if not options.no_tests:
        session.check("tests", lambda: run_tests(min(TEST_SECONDS, 0.4 * options.seconds)))
    if options.kernels:
        for rows, length in ((4, 1024), (2, 2048), (1, 4096), (1, 8192)):
            session.check(f"attention {rows} x {length}", functools.partial(attention_seconds, rows, length))
        for method, precision in (("lora", "bf16"), ("full", "bf16"), ("qlora", "int4")):
            session.check(f"fused {method}", functools.partial(fused_against_plain, method, precision))
    rate = session.part("matmul rate", lambda: matmul_rate("cuda")) or 780e12
    session.found["matmul_tflops"] = rate / 1e12
    session.part("cells", lambda: run_cells(session, rate, options.out))
    session.part("peers", lambda: run_peers(session), needs=22)
    session.found["cells"] = [record.to_dict() for record in session.records]
    (options.out / "gpu-tune.json").write_text(json.dumps(session.found, indent=1, default=str) + "\n")
    _print(session)


def _print(session: Session) -> None:
    print("tests:", str(session.found["checks"].get("tests"))[-200:])
    kernels = session.found.get("profile") or {}
    busy = [entry for entry in kernels.values() if entry[1] > 0]
    print(f"{PROFILED}: {sum(e[0] for e in busy):.0f} kernels, {sum(e[1] for e in busy):.1f} ms of the GPU")
    for name, (count, milliseconds) in list(kernels.items())[:16]:
        print(f"{milliseconds:9.2f} ms {count:6} x {name}")
    for name, why in session.found["failed"].items():
        print(f"failed: {name}: {why[:300]}")
    print(f"product {session.found['matmul_tflops']:.0f} TFLOP/s; {session.seconds - session.left:.0f} s used")
    print(HEADER)
    for record in session.records:
        print(cell_line(record))
    for result in session.found["peers"]:
        print(rival_line(result))


if __name__ == "__main__":
    main()
