"""What a run shows and leaves behind: a bar or lines on stderr, metrics.jsonl, loss.png, TensorBoard and W&B."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qwenfit.bench.memory import process_bytes
from qwenfit.errors import NotFound, QwenfitError
from qwenfit.planning.types import Plan
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.plot import line_chart

METRICS_NAME, CHART_NAME = "metrics.jsonl", "loss.png"
NARROW = 110  # characters of a terminal that a bar and the whole text need


class Progress:
    """Takes the loop's rows. `start` is the step that the run begins or goes on from."""

    def __init__(self, config: TuneConfig, made: Plan, device: str, start: int) -> None:
        self.config, self.made, self.device = config, made, device
        self.folder = Path(config.output)
        self.begun, self.start, self.seconds, self.tokens = time.perf_counter(), start, 0.0, 0
        self.peak = 0
        self._forget_after(start)
        self.file = (self.folder / METRICS_NAME).open("a", encoding="utf-8")
        self.bar = _bar() if sys.stderr.isatty() else None
        self.task = self.bar.add_task("", total=None) if self.bar is not None else None
        self.board = _tensorboard(self.folder) if config.tensorboard else None
        self.wandb = _wandb(config) if config.wandb else None

    def _forget_after(self, step: int) -> None:
        """Drop rows of steps that a resumed run takes again, and a line that was cut off."""
        path = self.folder / METRICS_NAME
        if path.exists():
            rows = [row for row in read_metrics(self.folder) if row["step"] <= step]
            aside = path.with_suffix(".tmp")
            aside.write_text("".join(json.dumps(_strict(row)) + "\n" for row in rows), encoding="utf-8")
            os.replace(aside, path)

    def __call__(self, row: dict[str, Any]) -> None:
        if "loss" in row:
            self.seconds += row["seconds"]
            self.tokens += row["tokens"]
            self.peak = max(self.peak, _peak_bytes(self.device))
            row = row | {
                "tokens_per_s": row["tokens"] / row["seconds"],
                "memory": self.peak,
                "planned_memory": self.made.memory.process,
            }
        self.file.write(json.dumps(_strict(row), allow_nan=False) + "\n")
        self.file.flush()
        for name, value in row.items():
            if self.board is not None and isinstance(value, int | float) and name not in ("step", "of"):
                self.board.add_scalar(name, value, row["step"])
        if self.wandb is not None:
            self.wandb.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
        self._show(row)

    def _show(self, row: dict[str, Any]) -> None:
        text = self._text(row)
        if self.bar is None:
            if "loss" not in row or row["step"] % self.config.log_every == 0 or "bad" in row:
                print(text, file=sys.stderr, flush=True)
        elif "loss" in row:
            self.bar.update(self.task, completed=row["step"], total=row["of"], description=text)
        else:
            self.bar.console.print(text)

    def _text(self, row: dict[str, Any]) -> str:
        if "eval_loss" in row:
            return f"step {row['step']}: evaluation loss {row['eval_loss']:.4f}"
        left = (row["of"] - row["step"]) * self.seconds / max(1, row["step"] - self.start)
        narrow = self.bar is not None and self.bar.console.width < NARROW
        parts = [
            f"{'' if narrow else 'step '}{row['step']}/{row['of']}",
            f"loss {row['loss']:.4f}",
            f"{row['tokens_per_s']:,.0f} trained tokens/s",
            f"{self.peak / 1e9:.2f} of {self.made.memory.process / 1e9:.2f} GB{'' if narrow else ' planned'}",
            f"{_clock(left)} left",
        ]
        text = (" " if narrow else "  ").join(parts)
        return text + (f"  NOT A NUMBER: {', '.join(row['bad'][:4])}" if "bad" in row else "")

    def close(self) -> None:
        """Ends the bar and the writers, and draws the loss."""
        if self.bar is not None:
            self.bar.stop()
        self.file.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish()
        rows = read_metrics(self.folder)
        lines = [[(row["step"], row[key]) for row in rows if row.get(key) is not None] for key in ("loss", "eval_loss")]
        line_chart(self.folder / CHART_NAME, lines)


def _strict(row: dict[str, Any]) -> dict[str, Any]:
    """The row with null for what is no finite number, which JSON has no word for."""
    return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that was cut off by a kill is left out."""
    rows = []
    for line in (folder / METRICS_NAME).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line, parse_constant=lambda _: None))  # older files say NaN
        except ValueError:
            break
    return rows


def summary(config: TuneConfig, code: int) -> dict[str, Any]:
    """What became of a run, as `--json` prints it: from its metrics, a resumed run's earlier steps included."""
    rows = read_metrics(Path(config.output))
    steps = [row for row in rows if "loss" in row]
    evaluations = [row["eval_loss"] for row in rows if "eval_loss" in row]
    last = steps[-1] if steps else {}
    result = Path(config.output) / ("model" if config.method == "full" else "adapter")
    return {
        "exit_code": code,
        "output": config.output,
        "result": str(result) if code == 0 else None,
        "bad_steps": sum("bad" in row for row in steps),
        "tokens": sum(row["tokens"] for row in steps),
        "seconds": sum(row["seconds"] for row in steps),
        "eval_loss": evaluations[-1] if evaluations else None,
        "best_eval_loss": min((loss for loss in evaluations if loss is not None), default=None),
    } | {name: last.get(name) for name in ("step", "of", "loss", "memory", "planned_memory")}


def _peak_bytes(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        # What the allocator took, and the context: as the plan counts a process.
        free, total = torch.cuda.mem_get_info(device)
        return max(torch.cuda.max_memory_reserved(device), total - free)
    return process_bytes(device)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=None), TextColumn("{task.description}"))  # the bar has what the text leaves
    bar = Progress(*columns, console=Console(stderr=True), expand=True)
    bar.start()
    return bar


def require_reporters(config: TuneConfig) -> None:
    """Raises NotFound, naming the package, for a reporter that was asked for and cannot be used."""
    reporters = ((config.tensorboard, "tensorboard", "torch.utils.tensorboard"), (config.wandb, "wandb", "wandb"))
    for wanted, package, module in reporters:
        if wanted and find_spec(package) is None:
            raise NotFound(f"This needs the package {package}, which is not installed.", f"pip install {package}")
        try:
            if wanted:
                import_module(module)
        except ImportError as error:
            raise NotFound(
                f"The package {package} is installed and cannot be imported: {error}.", f"pip install -U {package}"
            ) from error


def _tensorboard(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"))  # type: ignore[no-untyped-call, unused-ignore]


def _wandb(config: TuneConfig) -> Any:
    import wandb  # type: ignore[import-not-found, unused-ignore]

    try:
        return wandb.init(project=config.wandb, config=config.to_dict(), dir=config.output)
    except Exception as error:  # whatever it raises: no account, no network, a bad name
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise QwenfitError(f"W&B begins no run: {reason}.", "wandb login, or WANDB_MODE=offline") from error
