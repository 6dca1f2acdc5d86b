"""Two processes at a time, forked from one that stays; each launch of them runs a list of cases together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@dataclass
class Launched:
    codes: list[int]
    err: str

    def errors(self) -> str:
        """What was written that is no progress."""
        return "\n".join(line for line in self.err.splitlines() if not line.startswith("step "))[-4000:]


Launch = Callable[[Path, list[dict]], Launched]


@pytest.fixture(scope="session")
def launch():
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    pool = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("pool.py"))],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(folder: Path, cases: list[dict]) -> Launched:
        print(json.dumps({"folder": str(folder), "cases": cases}), file=pool.stdin, flush=True)
        return Launched(**json.loads(pool.stdout.readline()))

    yield run
    pool.stdin.close()
    pool.wait(20)
