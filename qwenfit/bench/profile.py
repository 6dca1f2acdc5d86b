"""Where the time of one decode step goes: by kernel on a GPU, by layer of the network on a CPU."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qwenfit.bench.memory import linear_bytes
from qwenfit.planning.inference_memory import kv_bytes_per_token
from qwenfit.planning.stack import get_stack

if TYPE_CHECKING:
    from qwenfit.engine.llm import LLM

AROUND = 4  # decode steps before the one that is profiled, and after it
REST = "engine, sampling, and what stands between"
PLAIN_KERNELS, INT_KERNELS = ("bf16_matvec", "bf16_tiles"), ("int_matvec", "int_lanes", "int_matmul")
CACHE_KERNELS = ("_attend",)


@dataclass(frozen=True)
class KernelUse:
    """One kernel (or layer) in one step: launches, microseconds in all, and bytes read where they are known."""

    name: str
    launches: int
    microseconds: float
    nbytes: int | None = None


@dataclass(frozen=True)
class Sizes:
    """Tokens of the prompt and of the answer, requests at once, and how often to repeat."""

    prompt: int = 1
    generate: int = 128
    batch: int = 1
    repeat: int = 3


def profile_decode(llm: LLM, sizes: Sizes) -> list[KernelUse]:
    """One decode step of all requests halfway through their answers, longest first; empty for answers too short.

    On a GPU kernels overlap, so their times add up to more than the step takes. The engine must be idle.
    """
    if sizes.generate < 2 * AROUND:
        return []
    context = sizes.prompt + sizes.generate // 2  # tokens of each request when the step begins
    ids = _add(llm, context - AROUND, sizes.batch, 2 * AROUND)
    try:
        while _generated(llm, sizes.batch) < AROUND:
            llm.engine.step()
        uses = _measure(llm, llm.engine.step)
    finally:
        llm.engine.abort(*ids)
        _drain(llm)
    return _with_bytes(llm, uses, context * sizes.batch)


def profile_prefill(llm: LLM, sizes: Sizes) -> list[KernelUse]:
    """The prompts of all requests, longest kernel first."""
    _add(llm, sizes.prompt, sizes.batch, 1)
    uses = _measure(llm, lambda: _drain(llm))
    return sorted(uses, key=lambda use: -use.microseconds)


def _add(llm: LLM, prompt: int, batch: int, tokens: int) -> list[int]:
    from qwenfit.engine.params import SamplingParams

    source = random.Random(prompt)
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    return [
        llm.engine.add([source.randrange(llm.engine.vocab_size) for _ in range(prompt)], params) for _ in range(batch)
    ]


def _generated(llm: LLM, batch: int) -> int:
    """Tokens that every one of `batch` requests has at least."""
    running = llm.engine.scheduler.running
    return min((request.num_generated for request in running), default=0) if len(running) == batch else 0


def _drain(llm: LLM) -> None:
    while llm.engine.has_work:
        llm.engine.step()


def _measure(llm: LLM, run: Callable[[], object]) -> list[KernelUse]:
    return _gpu_kernels(run) if llm.device.startswith("cuda") else _cpu_layers(llm, run)


def _with_bytes(llm: LLM, uses: list[KernelUse], tokens: int) -> list[KernelUse]:
    known = _known_bytes(llm, tokens)
    uses = [use if use.nbytes is not None else replace(use, nbytes=known(use.name)) for use in uses]
    return sorted(uses, key=lambda use: -use.microseconds)


def _gpu_kernels(run: Callable[[], object]) -> list[KernelUse]:
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    torch.cuda.synchronize()
    with torch_profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return by_name((event.name, event.device_time) for event in profiler.events() if event.device_time > 0)


def by_name(events: Any) -> list[KernelUse]:
    """(name, microseconds) of single launches, added up."""
    totals: dict[str, KernelUse] = {}
    for name, microseconds in events:
        short = name[:70]
        use = totals.get(short, KernelUse(short, 0, 0.0))
        totals[short] = replace(use, launches=use.launches + 1, microseconds=use.microseconds + microseconds)
    return list(totals.values())


def _known_bytes(llm: LLM, tokens: int) -> Callable[[str], int | None]:
    """Bytes that a kernel of the decode step reads, where its name says which tensors those are."""
    plain, packed = linear_bytes(llm)
    per_token = kv_bytes_per_token(llm.config, llm.engine.runner.cache.dtype, get_stack("qwenfit"))

    def of(name: str) -> int | None:
        if any(part in name for part in INT_KERNELS):
            return packed
        if any(part in name for part in PLAIN_KERNELS):
            return plain
        if any(part in name for part in CACHE_KERNELS) or name == "attention":
            return int(per_token * tokens)
        return None

    return of


def _cpu_layers(llm: LLM, run: Callable[[], object]) -> list[KernelUse]:
    with layer_times(llm) as uses:
        began = time.perf_counter()
        run()
        whole = 1e6 * (time.perf_counter() - began)
    rest = whole - sum(use.microseconds for use in uses.values())
    return [*uses.values(), KernelUse(REST, 1, rest)]


@contextmanager
def layer_times(llm: LLM) -> Iterator[dict[str, KernelUse]]:
    """Counts calls and time of the network's modules by the last part of their names, without what they call."""
    from qwenfit.model.linear import Linear

    model: Any = llm.engine.runner.model
    uses: dict[str, KernelUse] = {}
    inner: list[float] = []  # time spent in modules called by those that are open

    def add(name: str, seconds: float, nbytes: int | None) -> None:
        use = uses.get(name, KernelUse(name, 0, 0.0, None if nbytes is None else 0))
        read = None if nbytes is None or use.nbytes is None else use.nbytes + nbytes
        uses[name] = KernelUse(name, use.launches + 1, use.microseconds + 1e6 * seconds, read)

    def timed(call: Callable[..., Any], name: str, nbytes: int | None) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            inner.append(0.0)
            began = time.perf_counter()
            result = call(*args, **kwargs)
            seconds = time.perf_counter() - began
            add(name, seconds - inner.pop(), nbytes)
            if inner:
                inner[-1] += seconds
            return result

        return run

    names = {"self_attn": "attention", "mlp": "gate", "input_layernorm": "norm", "post_attention_layernorm": "norm"}
    patched: list[Any] = []
    for path, module in model.named_modules():
        last = path.rpartition(".")[2]
        if isinstance(module, Linear) or last in names or last == "norm":
            nbytes = module_bytes(module) if isinstance(module, Linear) else None
            module.forward = timed(module.forward, names.get(last, last), nbytes)
            patched.append(module)
    head = getattr(model, "lm_head", None)
    tied = model.embed_tokens.weight.nbytes if head is None else None
    model.logits = timed(model.logits, "lm_head" if head is None else "logits", tied)
    try:
        yield uses
    finally:
        for module in patched:
            del module.forward
        del model.logits


def module_bytes(module: Any) -> int:
    """Weight and bias of a Linear."""
    tensors = [*module.parameters(), *(vars(module.packed).values() if module.packed is not None else ())]
    return sum(t.nbytes for t in tensors if hasattr(t, "nbytes"))


def profile_table(uses: list[KernelUse], title: str) -> str:
    """The profile as aligned text; shares are of the sum."""
    whole = sum(use.microseconds for use in uses)
    rows = [(title, "launches", "MB", "us", "GB/s", "share")]
    for use in uses:
        nbytes, rate = "-", "-"
        if use.nbytes is not None:
            nbytes, rate = f"{use.nbytes / 1e6:,.1f}", f"{use.nbytes / use.microseconds / 1e3:,.0f}"
        rows.append(
            (use.name, str(use.launches), nbytes, f"{use.microseconds:,.1f}", rate, f"{use.microseconds / whole:.1%}")
        )
    rows.append(("all", str(sum(use.launches for use in uses)), "", f"{whole:,.1f}", "", ""))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        numbers = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join((name.ljust(widths[0]), *numbers)).rstrip())
    return "\n".join(lines)
