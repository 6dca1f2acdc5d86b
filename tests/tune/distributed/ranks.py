"""What one process of several does: it runs cases with the others and leaves what it saw in FOLDER/NAME.RANK.json.

    torchrun --nproc-per-node N ranks.py FOLDER cpu|cuda  # the cases are in FOLDER/cases.json

A case is {"name", "settings", "output" (else the name), "base" (else "base"), "samples", "die": [rank, micro-batch,
how] or absent}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from tune.tiny import settings, source

from qwenfit.tune import run
from qwenfit.tune.distributed import together
from qwenfit.tune.optimizer import local


class Dying:
    """A source that ends its process, or its run, at a micro-batch: by a signal, or by an exception."""

    def __init__(self, rows, at: int, how: str) -> None:
        self.rows, self.at, self.how, self.count = rows, at, how, 0

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, epoch: int, index: int):
        self.count += 1
        if self.count == self.at:
            if self.how == "raise":
                raise ValueError("a sample without a head")
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGTERM}[self.how])
        return self.rows.batch(epoch, index)


def run_case(folder: Path, case: dict, world) -> int:
    base = folder / case.get("base", "base")
    config = settings(base, output=str(folder / case.get("output", case["name"])), **case["settings"])
    rows = source(case.get("samples", 40), micro_batch=config.micro_batch, seq_len=config.seq_len)
    if "die" in case and case["die"][0] == world.rank:
        rows = Dying(rows, *case["die"][1:])
    seen: dict = {}
    train = run.train
    before = forget_peak()

    def watched(model, optimizer, *rest):
        seen["loading"] = peak() - before
        seen["held"] = sum(part(p).numel() for p in model.parameters())
        seen["total"] = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        seen["states"] = sum(t.numel() for t in optimizer.state()[0].values())
        return train(model, optimizer, *rest)

    run.train = watched
    said: list[str] = []
    evaluation = source(3, seed=2) if config.eval_data else None
    try:
        code = run.tune(config, lambda config, base: run.Data(rows, evaluation), said.append, world)
    finally:
        run.train = train
    found = seen | {"code": code, "said": said, "rank": world.rank, "size": world.size}
    (folder / f"{case['name']}.{world.rank}.json").write_text(json.dumps(found))
    return 0


def part(parameter):
    """What a process holds of a parameter that is sharded by fully_shard, by DeepSpeed, or not at all."""
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else local(parameter.detach())


def forget_peak() -> int:
    """Bytes resident now, from which `peak` counts anew."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    where, wanted = Path(sys.argv[1]), json.loads((Path(sys.argv[1]) / "cases.json").read_text())
    sys.exit(together(sys.argv[2], lambda world: max(run_case(where, case, world) for case in wanted)))
