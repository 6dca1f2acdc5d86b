"""`qwenfit bench guide`: every row of the guide's inference tables that fits one card, run on random weights.

Weights are made once for a model and precision, on the device; each row gets an engine of its own, whose paged cache
is allocated for the whole row at once, so memory does not depend on how many of its tokens are generated.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenfit.bench.guide_page import guide_page
from qwenfit.bench.guide_rows import Row, Run, grouped
from qwenfit.bench.memory import measure_memory
from qwenfit.bench.record import versions
from qwenfit.bench.run import timed_run
from qwenfit.catalog import get_model
from qwenfit.config import ModelConfig
from qwenfit.errors import QwenfitError
from qwenfit.hardware import Device, Hardware, match_detected
from qwenfit.planning.inference_memory import BLOCK
from qwenfit.planning.inference_speed import decode_flops, step_reads
from qwenfit.planning.planner import build_plan
from qwenfit.planning.stack import get_stack
from qwenfit.planning.task import Inference
from qwenfit.planning.types import Plan

if TYPE_CHECKING:
    from qwenfit.model.transformer import Transformer

LEAST_TOKENS = 64  # of a row that is cut short
WARM_UP_TOKENS = 3
FIGURES = (("tokens_per_s", "tokens/s", 1.0), ("allocated", "GB", 1e9), ("process", "GB", 1e9))  # held to the plan


@dataclass(frozen=True)
class Bench:
    """Where the rows run and what makes their weights. `limits`: measured "read" bytes/s and "bf16" FLOP/s."""

    device: Device
    torch_device: str
    make_model: Callable[[ModelConfig, str], Transformer]
    limits: dict[str, float]
    config_of: Callable[[str], ModelConfig] = get_model


def gpu_bench() -> Bench:
    """The first CUDA device, its limits measured now. QwenfitError when there is none or it is not known."""
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # read at the first allocation
    import torch

    if not torch.cuda.is_available():
        raise QwenfitError("The guide's rows run on a GPU, and no CUDA device was found here.", "qwenfit doctor")
    from qwenfit.bench.gpu_decode import random_model
    from qwenfit.kernels.triton.launch import device_limits

    name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    device = match_detected(name, total)
    if device is None:
        raise QwenfitError(f"The catalog has no card {name!r} of {total / 1e9:.0f} GB, so nothing can be planned.")
    limits = device_limits()
    torch.cuda.empty_cache()
    device = replace(device, memory_bytes=total, free_bytes=total, visible_bytes=None, detected=True)
    return Bench(device, "cuda", random_model, limits)


def run_guide(
    bench: Bench,
    rows: Sequence[Row],
    *,
    seconds_per_row: float | None = None,
    deadline: float | None = None,
    command: str = "qwenfit bench guide",
    tell: Callable[[str], None] = print,
    save: Callable[[dict[str, Any]], None] = lambda record: None,
) -> dict[str, Any]:
    """Measures the rows; returns the record, and hands it to `save` after each model, as far as it has come.

    A run longer than `seconds_per_row` by its plan is cut to the tokens that fit (the record says how many); runs that
    `deadline` seconds have passed before are left out. What fails is written into its row, and the rest goes on.
    """
    began = time.perf_counter()
    results: dict[Run, dict[str, Any]] = {}

    def record() -> dict[str, Any]:
        return _record(bench, rows, results, command, seconds_per_row, time.perf_counter() - began)

    for (name, precision), runs in grouped(rows).items():
        config = bench.config_of(name)
        fitting = {run: whole for run, whole in runs.items() if plan_of(bench, run).fits}
        for run in runs.keys() - fitting.keys():
            results[run] = {"why": _does_not_fit(plan_of(bench, run))}
        late = deadline is not None and time.perf_counter() - began > deadline
        made = time.perf_counter()
        try:
            model = bench.make_model(config, precision) if fitting and not late else None
        except Exception as error:  # one model's failure is not the others'
            results |= {run: {"why": _one_line(error)} for run in fitting}
            continue
        made = time.perf_counter() - made
        for run, whole in fitting.items():
            if deadline is not None and time.perf_counter() - began > deadline:
                results[run] = {"why": f"left out: {deadline:g} s had passed."}
                continue
            assert model is not None
            generated = tokens_for(plan_of(bench, run), run, None if whole else seconds_per_row)
            try:
                results[run] = _measure(bench, model, config, run, generated) | {"weights_seconds": made}
            except Exception as error:
                results[run] = {"why": _one_line(error)}
            tell(_line(run, results[run]))
        del model
        _clean(bench)
        save(record())
    return record()


def plan_of(bench: Bench, run: Run, generated: int | None = None) -> Plan:
    """The plan of a run on this card, or of its first `generated` tokens."""
    task = Inference(1, generated or run.tokens, run.batch, kv_cache=run.kv_cache)
    config, hardware = bench.config_of(run.model), Hardware(bench.device)
    return build_plan(config, hardware, task, run.precision, get_stack("qwenfit"))


def tokens_for(plan: Plan, run: Run, seconds: float | None) -> int:
    """How many tokens each request generates, so that the run takes about `seconds` by its plan."""
    per_request = plan.speed.tokens_per_s_per_request
    assert per_request is not None
    return run.tokens if seconds is None else min(run.tokens, max(LEAST_TOKENS, int(seconds * per_request)))


def expected_seconds(bench: Bench, rows: Sequence[Row], seconds_per_row: float | None) -> float:
    """What generating takes by the plan, without making weights and compiling kernels."""
    total = 0.0
    for runs in grouped(rows).values():
        for run, whole in runs.items():
            plan = plan_of(bench, run)
            if plan.fits:
                tokens = tokens_for(plan, run, None if whole else seconds_per_row)
                total += tokens / (plan_of(bench, run, tokens).speed.tokens_per_s_per_request or 1)
    return total


def _measure(bench: Bench, model: Transformer, config: ModelConfig, run: Run, generated: int) -> dict[str, Any]:
    """One run on an engine of its own: memory at its peak, and tokens/s over the whole of generate()."""
    import torch

    from qwenfit.engine.llm import LLM

    on_gpu = bench.torch_device.startswith("cuda")
    _clean(bench)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    context = 1 + run.tokens
    llm = LLM.from_parts(
        model,
        config,
        None,
        device=bench.torch_device,
        kv_cache=run.kv_cache,
        max_model_len=context,
        max_num_seqs=run.batch,
        max_batched_tokens=max(2048, run.batch),
        num_blocks=run.batch * -(-context // BLOCK),
        block_size=BLOCK,
    )
    timed_run(llm, 1, min(WARM_UP_TOKENS, generated), run.batch, seed=0)  # compiles kernels, records the graph
    timed = timed_run(llm, 1, generated, run.batch, seed=1)
    memory = measure_memory(llm)
    task = Inference(1, generated, run.batch, kv_cache=run.kv_cache)
    read = sum(step_reads(config, Hardware(bench.device), task, run.precision, get_stack("qwenfit")).values())
    steps_per_s = timed.total / run.batch
    return {
        "generated": generated,
        "seconds": run.batch * generated / timed.total,
        "tokens_per_s": timed.total,
        "bytes_per_step": read,
        "bytes_per_s": read * steps_per_s,
        "read_share": read * steps_per_s / bench.limits["read"],
        "flops_per_s": decode_flops(config) * timed.total,
        "flops_share": decode_flops(config) * timed.total / bench.limits["bf16"],
        "weights": memory.weights,
        "kv_cache": memory.kv_cache,
        "allocated": memory.allocated,
        "reserved": memory.reserved,
        "process": memory.process,
    }


def _clean(bench: Bench) -> None:
    """Give the memory of the last engine and its graphs back, so that the next row's is its own."""
    gc.collect()
    if bench.torch_device.startswith("cuda"):
        import torch

        torch.cuda.empty_cache()


def _record(
    bench: Bench,
    rows: Sequence[Row],
    results: dict[Run, dict[str, Any]],
    command: str,
    seconds_per_row: float | None,
    seconds: float,
) -> dict[str, Any]:
    written = [_written(bench, row, results.get(row.run, {"why": "not run."})) for row in rows]
    return {
        "schema": 1,
        "kind": "guide",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "hardware": bench.device.name,
        "memory_bytes": bench.device.memory_bytes,
        "versions": versions(),
        "limits": bench.limits,
        "seconds_per_row": seconds_per_row,
        "seconds": seconds,
        "rows": written,
        "figures": _figures(written),
    }


def _written(bench: Bench, row: Row, result: dict[str, Any]) -> dict[str, Any]:
    """A row as the record keeps it: the guide's figures, the plan's, and the measured ones or why there are none."""
    plan = plan_of(bench, row.run)
    speed = plan_of(bench, row.run, result.get("generated")).speed
    memory = plan.memory
    return {
        "table": row.table,
        **asdict(row.run),
        "guide": {"gib": row.gib, "tokens_per_s": row.tokens_per_s},
        "plan": {
            "weights": memory.weights,
            "kv_cache": memory.kv_cache,
            "allocated": memory.allocated,
            "process": memory.process,
            "tokens_per_s": speed.tokens_per_s,
            "bound": speed.bound,
            "verdict": plan.verdict,
        },
        "measured": None if "why" in result else result,
        "why": result.get("why"),
    }


def _figures(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens/s and memory of every run as planned and measured, for the accuracy page; rows of one run once."""
    found = {}
    for row in rows:
        if row["measured"] is not None:
            run = f"{row['model']} {row['precision']}, {row['kv_cache']} cache, {row['batch']} x {row['tokens']}"
            for figure, unit, scale in FIGURES:
                planned, measured = row["plan"][figure] / scale, row["measured"][figure] / scale
                found[f"{run}: {figure}"] = {
                    "name": figure,
                    "unit": unit,
                    "planned": planned,
                    "measured": measured,
                    "error": planned / measured - 1,
                }
    return found


def _does_not_fit(plan: Plan) -> str:
    return f"does not fit: {plan.memory.process / 2**30:.0f} GiB of {plan.capacity / 2**30:.0f}."


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}" + (f": {text[0]}" if text else "") + "."


def _line(run: Run, result: dict[str, Any]) -> str:
    what = f"{run.model} {run.precision}, {run.kv_cache} cache, {run.batch} x {run.tokens}"
    if "why" in result:
        return f"{what}: {result['why']}"
    return (
        f"{what}: {result['tokens_per_s']:.1f} tokens/s over {result['generated']}, {result['read_share']:.0%} of the "
        f"read; {result['allocated'] / 2**30:.2f} GiB allocated, {result['process'] / 2**30:.2f} process; "
        f"{result['seconds']:.1f} s"
    )


def record_name(record: dict[str, Any]) -> str:
    """guide-CARD-DATE.json"""
    card = "".join(c if c.isalnum() else "-" for c in record["hardware"].lower())
    return f"guide-{card}-{record['date'][:19].replace(':', '-').lower()}.json"


def run_and_write(
    bench: Bench,
    rows: Sequence[Row],
    folder: Path,
    page: Path | None,
    *,
    seconds_per_row: float | None,
    deadline: float | None,
    command: str,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """`run_guide`, with the record in `folder` and the page at `page`, both kept up as models are done."""
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")

    def save(record: dict[str, Any]) -> None:
        record["date"] = started  # one run, one file
        name = record_name(record)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if page is not None:
            page.parent.mkdir(parents=True, exist_ok=True)
            page.write_text(guide_page(record, name), encoding="utf-8")

    tell(f"about {expected_seconds(bench, rows, seconds_per_row):.0f} s of generating, planned on {bench.device.name}")
    record = run_guide(
        bench, rows, seconds_per_row=seconds_per_row, deadline=deadline, command=command, tell=tell, save=save
    )
    save(record)
    return record
