"""A plan as text: a table, a stacked bar and the verdict for the terminal; Markdown and CSV for files."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence

from qwenfit.planning.task import Inference, Task
from qwenfit.planning.types import DOES_NOT_FIT, FITS, TIGHT, Memory, Plan, Speed

GIB, GB = 2**30, 10**9
BAR_WIDTH = 60
# (part, glyph, ANSI colour): a part keeps its glyph in the bar and in the table.
PARTS = (
    ("weights", "█", 34),
    ("kv_cache", "▓", 36),
    ("adapters", "a", 32),
    ("gradients", "g", 33),
    ("optimizer", "o", 35),
    ("logits", "l", 31),
    ("activations", "▒", 33),
    ("workspace", "w", 37),
    ("reserve", "r", 90),
    ("context", "c", 90),
)
VERDICT_COLOUR = {FITS: 32, TIGHT: 33, DOES_NOT_FIT: 31}


def size(value: float) -> str:
    """Both units: `15.44 GB (14.38 GiB)`."""
    return f"{value / GB:.2f} GB ({value / GIB:.2f} GiB)"


def plan_text(plan: Plan, colour: bool = False) -> str:
    """What `qwenfit plan MODEL` prints."""
    paint = _painter(colour)
    lines = [_title(plan), _verdict_line(plan, paint), "", memory_bar(plan.memory, plan.capacity, paint)]
    lines += ["", *_memory_rows(plan, paint), "", *_speed_rows(plan.speed, plan), "", f"run     {plan.command}"]
    lines += [f"note    {note}" for note in plan.notes]
    lines += _advice_rows(plan)
    lines.append(f"source  {plan.hardware.device.source}")
    return "\n".join(lines)


def _painter(colour: bool) -> Callable[[str, int], str]:
    return (lambda text, code: f"\x1b[{code}m{text}\x1b[0m") if colour else (lambda text, code: text)


def _title(plan: Plan) -> str:
    parts = (plan.model.name, plan.task.name, plan.precision, what_task(plan.task), hardware_name(plan))
    return " · ".join((*parts, f"stack {plan.stack}"))


def what_task(task: Task) -> str:
    """The sizes of a task in a few words."""
    if isinstance(task, Inference):
        return f"{task.batch} x ({task.prompt:,} prompt + {task.generate:,} generated tokens), {task.kv_cache} KV cache"
    return f"{task.seq_len:,} tokens x {task.micro_batch} x {task.grad_accum} accumulated, optimizer {task.optimizer}"


def hardware_name(plan: Plan) -> str:
    """`2 nodes of 8 x A100-SXM4-80GB (zero3)`."""
    hardware = plan.hardware
    text = f"{hardware.gpus} x {hardware.device.name}"
    if hardware.nodes > 1:
        text = f"{hardware.nodes} nodes of {text}"
    return text if plan.parallel == "single" else f"{text} ({plan.parallel})"


def _verdict_line(plan: Plan, paint: Callable[[str, int], str]) -> str:
    word = paint(plan.verdict, VERDICT_COLOUR[plan.verdict])
    used, left = plan.memory.process, plan.headroom
    where = "" if plan.hardware.world_size == 1 else " on the fullest device"
    kind = "free" if plan.hardware.device.detected else "usable"
    rest = f"{size(left)} left" if left >= 0 else f"short by {size(-left)}"
    return f"{word}: {size(used)} of {size(plan.capacity)} {kind}{where}, {rest}"


def memory_bar(memory: Memory, capacity: int, paint: Callable[[str, int], str]) -> str:
    """One row as wide as the larger of need and capacity; `|` is the capacity, `.` what is left."""
    scale = max(capacity, memory.process)
    edge = round(BAR_WIDTH * capacity / scale)
    cells: list[str] = []
    total = 0
    for part, glyph, code in PARTS:
        total += int(getattr(memory, part))
        until = round(BAR_WIDTH * total / scale)
        cells += [paint(glyph, code)] * (until - len(cells))
    cells += ["."] * (BAR_WIDTH - len(cells))
    cells.insert(edge, "|")
    return "".join(cells)


def _memory_rows(plan: Plan, paint: Callable[[str, int], str]) -> list[str]:
    memory = plan.memory
    rows = []
    for part, glyph, code in PARTS:
        value = int(getattr(memory, part))
        if value:
            rows.append(f"{paint(glyph, code)} {part.replace('_', ' '):<12}{_columns(value, plan.capacity)}")
    for total in ("allocated", "reserved", "process"):
        rows.append(f"  {total:<12}{_columns(int(getattr(memory, total)), plan.capacity)}")
    return rows


def _columns(value: int, capacity: int) -> str:
    return f"{value / GB:>9.2f} GB {value / GIB:>9.2f} GiB {100 * value / max(1, capacity):>6.1f} %"


def _speed_rows(speed: Speed, plan: Plan) -> list[str]:
    if speed.seconds_per_iter is not None and speed.seconds_per_iter_interval is not None:
        span = speed.seconds_per_iter_interval
        return [
            f"speed   {speed.seconds_per_iter:.2f} s/iter ({span.low:.2f} to {span.high:.2f}), bound by {speed.bound}",
            f"        {speed.tokens_per_s:,.0f} trained tokens/s over all devices",
        ]
    low, high = _number(speed.interval.low), _number(speed.interval.high)
    rows = [f"speed   {_number(speed.tokens_per_s)} tokens/s generated ({low} to {high}), bound by {speed.bound}"]
    assert isinstance(plan.task, Inference)
    each_span, first_span = speed.tokens_per_s_per_request_interval, speed.time_to_first_token_interval
    if plan.task.batch > 1 and speed.tokens_per_s_per_request is not None and each_span is not None:
        low, high = _number(each_span.low), _number(each_span.high)
        each = f"{_number(speed.tokens_per_s_per_request)} tokens/s ({low} to {high})"
        rows.append(f"        {each} for each of {plan.task.batch:,} requests")
    if speed.time_to_first_token is not None and first_span is not None:
        low, high = _seconds(first_span.low), _seconds(first_span.high)
        first = f"{_seconds(speed.time_to_first_token)} ({low} to {high})"
        of = f"to the first token of a {plan.task.prompt:,}-token prompt"
        rows.append(f"        {first} {of}, bound by {speed.time_to_first_token_bound}")
    return rows


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _seconds(value: float) -> str:
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def _advice_rows(plan: Plan) -> list[str]:
    rows = []
    for advice in plan.advice:
        figures = []
        if advice.process_bytes is not None:
            figures.append(size(advice.process_bytes))
        if advice.tokens_per_s is not None:
            figures.append(f"{_number(advice.tokens_per_s)} tokens/s")
        tail = f" [{', '.join(figures)}]" if figures else ""
        rows.append(f"advice  {advice.what}: {advice.why}{tail}")
    return rows


TABLE_HEADER = ("model", "precision", "hardware", "verdict", "memory GB", "memory GiB", "free GB", "tokens/s", "bound")


def table_row(plan: Plan) -> tuple[str, ...]:
    """One plan as a row under TABLE_HEADER; finetuning shows s/iter in place of tokens/s."""
    speed = plan.speed
    pace = _number(speed.tokens_per_s) if speed.seconds_per_iter is None else f"{speed.seconds_per_iter:.2f} s/iter"
    return (
        plan.model.name,
        plan.precision,
        hardware_name(plan),
        plan.verdict,
        f"{plan.memory.process / GB:.2f}",
        f"{plan.memory.process / GIB:.2f}",
        f"{plan.headroom / GB:.2f}",
        pace,
        speed.bound,
    )


def plans_table(plans: Sequence[Plan], form: str = "text", prices: bool = False) -> str:
    """Plans side by side as aligned text, Markdown ("md") or CSV ("csv"); `prices` adds that of the cards."""
    rows = [TABLE_HEADER, *(table_row(p) for p in plans)]
    if prices:
        rows = [(*row, last) for row, last in zip(rows, ("list price $", *map(_price, plans)), strict=True)]
    if form == "csv":
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue().removesuffix("\n")
    return _aligned(rows, form)


def _price(plan: Plan) -> str:
    """The cards' list price at launch, "-" where none was announced."""
    price = plan.hardware.device.price_usd
    return "-" if price is None else f"{price * plan.hardware.world_size:.0f}"


def _aligned(rows: Sequence[Sequence[str]], form: str) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    if form == "md":
        rule = ["-" * width for width in widths]
        return "\n".join("| " + " | ".join(row) + " |" for row in [padded[0], rule, *padded[1:]])
    return "\n".join("  ".join(row).rstrip() for row in padded)


def fits_matrix(plans: Sequence[Plan], form: str = "text") -> str:
    """One row a model, one column a precision: `17.0 GB, 54/s`, with `(tight)`, or `-` where it does not fit.

    Models that fit in no precision are left out. The pace is generated tokens/s, or s/iter for finetuning.
    """
    columns = list(dict.fromkeys(_column(p) for p in plans))
    models = list(dict.fromkeys(p.model.name for p in plans if p.fits))
    cells = {(p.model.name, _column(p)): _fit_cell(p) for p in plans}
    rows = [("model", *columns)] + [(m, *(cells.get((m, c), "-") for c in columns)) for m in models]
    return _aligned(rows, form)


def _column(plan: Plan) -> str:
    return "16-bit" if plan.precision in ("bf16", "fp16") else plan.precision


def _fit_cell(plan: Plan) -> str:
    if not plan.fits:
        return "-"
    speed = plan.speed
    pace = (
        f"{_number(speed.tokens_per_s)}/s" if speed.seconds_per_iter is None else f"{speed.seconds_per_iter:.1f} s/iter"
    )
    return f"{plan.memory.process / GB:.1f} GB, {pace}" + (" (tight)" if plan.verdict == TIGHT else "")
