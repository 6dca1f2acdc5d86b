"""Runs that end by a signal, each in a process of its own forked from one that has imported torch and computed nothing.

    python killed.py FOLDER < cases.json

Cases run one after the other: {"name", "output", "settings", "die_at" or "signals"}. Prints one JSON object: name ->
[exit status as os.wait gives, the newest checkpoint that verifies then, file operations counted].
`die_at` n: SIGKILL at the n-th file operation in checkpoints/ of the run, 0: never.
`signals`: [[micro-batch position, signal, times], ...] sent to itself when that micro-batch is asked for.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
import torch._dynamo  # checkpointing asks for it: slow to import, so before the forks
from tune.tiny import settings, source, tune_tiny

import qwenfit.tune.run  # noqa: F401  # imported once, before the forks
from qwenfit.tune import checkpoint


class Points:
    """Counts the audited file operations that touch a run's checkpoints; dies at one of them."""

    EVENTS = frozenset({"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "shutil.rmtree"})

    def __init__(self, die_at: int) -> None:
        self.count, self.die_at = 0, die_at
        sys.addaudithook(self.audit)
        fsync = os.fsync
        os.fsync = lambda handle: (self.reach(), fsync(handle))[1]

    def audit(self, event: str, arguments: tuple) -> None:
        if event in self.EVENTS and "checkpoints/" in str(arguments[0]):
            self.reach()

    def reach(self) -> None:
        self.count += 1
        if self.count == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


class Signalling:
    """A source that sends signals on the way."""

    def __init__(self, rows, signals) -> None:
        self.rows, self.signals = rows, dict(signals)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, epoch: int, index: int):
        for _ in range(self.signals.get(epoch * len(self) + index, (0, 0))[1]):
            os.kill(os.getpid(), self.signals[epoch * len(self) + index][0])
        return self.rows.batch(epoch, index)


def run(folder: Path, case: dict) -> int:
    config = settings(folder / "base", output=str(folder / case["output"]), **case["settings"])
    if "signals" in case:
        rows = source(micro_batch=config.micro_batch, seq_len=config.seq_len, seed=1)
        return tune_tiny(config, data=Signalling(rows, [(p, (s, n)) for p, s, n in case["signals"]]))
    points = Points(case.get("die_at", 0))
    code = tune_tiny(config)
    (folder / "count").write_text(str(points.count))
    return code


def in_a_child(folder: Path, case: dict) -> list:
    (folder / "count").write_text("0")
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = run(folder, case)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    newest = checkpoint.newest(folder / case["output"] / "checkpoints")[0]
    return [status, newest and newest.name, int((folder / "count").read_text())]


def main() -> None:
    torch.set_num_threads(1)
    folder, cases = Path(sys.argv[1]), json.load(sys.stdin)
    print(json.dumps({case["name"]: in_a_child(folder, case) for case in cases}))


if __name__ == "__main__":
    main()
