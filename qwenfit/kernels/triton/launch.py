"""What every launch of a kernel here shares."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import threading
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.runtime.jit import JITFunction

_COMPILING = threading.Lock()
_compiling: _Compiling | None = None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# A sum after a product is one instruction with it. Triton does so by itself until 3.10, and 3.9 warns of it.
FUSED_SUMS = {"enable_fp_fusion": True}


@triton.jit
def start_after_previous(overlap: tl.constexpr):
    """Wait for the kernel before this one, then let the kernel after it start its own prologue.

    What stands above this call runs beside the previous kernel (programmatic dependent launch), so it may read weights
    and what was written by the kernel before the previous one or earlier, and may write nothing. Every kernel calls it
    once, and in this order, so that the end of one implies the end of all before it.
    """
    if overlap:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def after_loads(nought, INTERPRETED: tl.constexpr):
    """The argument, 0, in a way that the assembler cannot see through.

    It moves loads for the next round down behind the arithmetic of this one, to save registers, and so leaves the
    memory idle. In a branch of its own with the loads, this is a value that the arithmetic must wait for.
    """
    if INTERPRETED:
        return nought
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }",
            "=r,r", [nought], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def prefetch_line(at):
    """Ask the second-level cache for the lines of 128 bytes that hold what is at some pointers."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def prefetch_rows(
    w_ptr, first, outputs, column, inputs, ROWS: tl.constexpr, LINES: tl.constexpr, WARPS: tl.constexpr
):  # fmt: skip
    """Ask the second-level cache for some lines of each of ROWS rows of w [outputs, inputs], from `column` on."""
    EACH: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth  # numbers of a line
    for i in tl.static_range((ROWS * LINES + 32 * WARPS - 1) // (32 * WARPS)):
        line = i * 32 * WARPS + tl.arange(0, 32 * WARPS)
        row = tl.minimum(first + line // LINES, outputs - 1).to(tl.int64)
        prefetch_line(w_ptr + row * inputs + tl.minimum(column + line % LINES * EACH, inputs - 1))


@functools.cache
def _overlaps(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def options(tensor: torch.Tensor, beside: bool = True) -> dict[str, Any]:
    """Keyword arguments of a launch on `tensor`'s device: FUSED_SUMS, and programmatic dependent launch if it has that.

    beside: the kernel may begin while the one before it runs, and the next one while it does. A core on which it begins
    so keeps its memory divided into shared memory and first-level cache as the kernel before needed it. Where that
    leaves the cache little, a kernel that takes long and reads through it had better begin later.
    """
    if INTERPRETED or not beside or not _overlaps(tensor.device):
        return {"OVERLAP": False, **FUSED_SUMS}
    return {"OVERLAP": True, "launch_pdl": True, **FUSED_SUMS}


class _Loading(ThreadPoolExecutor):
    """Compiles kernels and loads them as well, for which older versions of Triton call a C compiler."""

    given_up = False  # what has not begun fails then

    def submit(self, compiled: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        def load() -> Any:
            if self.given_up:
                raise RuntimeError("interrupted")
            kernel = compiled(*arguments, **named)
            _ = kernel.run  # makes it
            return kernel

        return super().submit(load)

    def also(self, make: Callable[[], object]) -> Future[object]:
        """Compile what is not Triton's."""
        return super().submit(lambda: None if self.given_up else make())


@dataclass
class _Compiling:
    """What `compile_side_by_side` is doing, on behalf of a thread."""

    thread: int
    threads: _Loading
    others: dict[Hashable, Future[object]] = field(default_factory=dict)  # what is not Triton's


def compiled_instead(key: Hashable, make: Callable[[], object]) -> bool:
    """Whether this is within `compile_side_by_side`: one of its threads compiles then, nothing is to be launched.

    What has the same key is compiled once.
    """
    compiling = _compiling
    if compiling is None or compiling.thread != threading.get_ident():
        return False
    if key not in compiling.others:
        compiling.others[key] = compiling.threads.also(make)
    return True


def compile_side_by_side(launch: Callable[[], object]) -> None:
    """Compile and load the kernels that `launch` launches, on all cores, and run none of them.

    One after the other they take a minute where none has been compiled before. What fails here is met again, and told
    of, where it is launched.
    """
    global _compiling
    if INTERPRETED or not hasattr(triton, "AsyncCompileMode"):
        return
    on_device = (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_available() else (None, ())
    with _COMPILING:
        run, mine = JITFunction.run, threading.get_ident()
        seen: set[Any] = set()

        def only_compile(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            if threading.get_ident() == mine:  # other threads' launches are none of ours
                warmup = True
                seen.add(self)
            return run(self, *arguments, grid=grid, warmup=warmup, **options)

        threads = _Loading(min(16, os.cpu_count() or 1), "compile", *on_device)
        _compiling = mine_now = _Compiling(mine, threads)

        def launch_and_wait() -> None:
            with contextlib.suppress(Exception), triton.AsyncCompileMode(threads, ignore_errors=True):
                try:
                    launch()
                except BaseException as failure:
                    if not isinstance(failure, Exception):  # an interrupt waits for what has begun, and no more
                        threads.given_up = True
                    raise

        JITFunction.run = only_compile
        try:
            contextvars.copy_context().run(launch_and_wait)  # an interrupted mode is on in its own context only
            wait(mine_now.others.values())
        except BaseException:
            threads.given_up = True
            with contextlib.suppress(ImportError, AttributeError):  # of a Triton that keeps them elsewhere
                _forget_unmade(seen)
            raise
        finally:
            JITFunction.run, _compiling = run, None
            threads.shutdown(wait=False)


def _forget_unmade(functions: Iterable[Any]) -> None:
    """Have kernels that were promised to these functions, and not made, compiled when they are launched."""
    from triton.runtime._async_compile import FutureKernel

    for function in functions:
        for kernels, *_ in function.device_caches.values():
            for key in [key for key, kernel in kernels.items() if isinstance(kernel, FutureKernel)]:
                del kernels[key]


def device_limits() -> dict[str, float]:
    """What this GPU reaches: "read" and "copy" bytes/s (a copy counts both ways) and "bf16" FLOP/s; the best of 5.

    Over 4 GiB, or an eighth of the memory that is free.
    """
    data = torch.randn(min(1 << 30, torch.cuda.mem_get_info()[0] // 32), device="cuda")
    target = torch.empty_like(data)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {
        "read": data.nbytes / best_seconds(lambda: data.sum()),
        "copy": 2 * data.nbytes / best_seconds(lambda: target.copy_(data)),
        "bf16": 2 * 8192**3 / best_seconds(lambda: a @ b),
    }


def best_seconds(run: Callable[[], object], times: int = 5) -> float:
    """The GPU's time of what `run` launches, the best of some."""
    best = float("inf")
    for _ in range(times):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        best = min(best, start.elapsed_time(stop) / 1e3)
    return best
