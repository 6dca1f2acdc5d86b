"""What a run costs beside what this device can do: bytes, FLOPs and launches, rates, and shares of measured limits."""

from __future__ import annotations

import time
from dataclasses import dataclass

from qwenfit.bench.record import Figure
from qwenfit.planning.inference_memory import CHUNK
from qwenfit.planning.inference_speed import decode_flops, prefill_flops, step_reads
from qwenfit.planning.stack import get_stack
from qwenfit.planning.task import Inference
from qwenfit.planning.types import Plan

CPU_SQUARE = 1024  # of the products that give a CPU's rate


@dataclass(frozen=True)
class Limits:
    """What this device reached just before, in this process: bytes/s of a plain read, FLOP/s of a large product."""

    read: float
    flops: float


@dataclass(frozen=True)
class Cost:
    """Bytes read and floating-point operations of one decode step of all requests, or of one prompt."""

    nbytes: float
    flops: float


def measured_limits(device: str) -> Limits:
    """Read on a GPU: a sum over 4 GB; product: bf16, 8192^3. On a CPU: all threads; the faster of fp32 and bf16."""
    if device.startswith("cuda"):
        import torch

        from qwenfit.kernels.triton.launch import device_limits

        limits = device_limits()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # what is measured next has a peak of its own
        return Limits(limits["read"], limits["bf16"])
    from qwenfit.detect import measure_bandwidth

    return Limits(measure_bandwidth(), _cpu_flops())


def _cpu_flops() -> float:
    import torch

    best = float("inf")
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(CPU_SQUARE, CPU_SQUARE, dtype=dtype) for _ in range(2))
        for _ in range(3):
            began = time.perf_counter()
            a @ b
            best = min(best, time.perf_counter() - began)
    return 2 * CPU_SQUARE**3 / best


def decode_cost(made: Plan) -> Cost:
    """One decode step at the mean context: all weights but the embedding table, and the cache; two FLOPs a weight."""
    task = made.task
    assert isinstance(task, Inference)
    reads = step_reads(made.model, made.hardware, task, made.precision, get_stack(made.stack))
    return Cost(sum(reads.values()), decode_flops(made.model) * task.batch)


def prefill_cost(made: Plan) -> Cost:
    """The prompts of all requests: the weights once for every chunk of tokens, products and causal attention."""
    task = made.task
    assert isinstance(task, Inference)
    alone = Inference(1, 1, head_precision=task.head_precision)
    reads = step_reads(made.model, made.hardware, alone, made.precision, get_stack(made.stack))
    weights = sum(nbytes for kind, nbytes in reads.items() if not kind.startswith("cache"))
    chunks = -(-task.batch * task.prompt // CHUNK)
    return Cost(chunks * weights, task.batch * prefill_flops(made.model, task.prompt))


def cost_figures(cost: Cost, seconds: float, limits: Limits, launches: int | None) -> list[Figure]:
    """The card of one step or prompt that took `seconds`; `launches` None where nobody counted."""
    rates = (cost.nbytes / seconds, cost.flops / seconds)
    figures = [
        Figure("time", "ms", None, 1e3 * seconds),
        Figure("bytes_read", "GB", None, cost.nbytes / 1e9),
        Figure("flops", "GFLOP", None, cost.flops / 1e9),
        Figure("bytes_per_s", "GB/s", None, rates[0] / 1e9),
        Figure("flops_per_s", "TFLOP/s", None, rates[1] / 1e12),
        Figure("read_share", "of the read measured", None, rates[0] / limits.read),
        Figure("flops_share", "of the product measured", None, rates[1] / limits.flops),
    ]
    if launches is not None:
        figures.insert(3, Figure("launches", "kernels", None, launches))
    return figures
