"""One process of several: runs cases together with the others and leaves what it saw in FOLDER/NAME.RANK.json.

    torchrun --nproc-per-node 2 ranks.py FOLDER < nothing; the cases are in FOLDER/cases.json

Each case is {"name", "settings", "micro_batches" (of an epoch), "die": [rank, micro-batch, how] or absent}.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from tune.tiny import settings, source

from qwenfit.tune import run
from qwenfit.tune.distributed import together
from qwenfit.tune.optimizer import local


class Dying:
    """A source that ends its process at a micro-batch: by a signal, or by an exception."""

    def __init__(self, rows, at: int, how: str) -> None:
        self.rows, self.at, self.how, self.count = rows, at, how, 0

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, epoch: int, index: int):
        self.count += 1
        if self.count == self.at:
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("a sample without a head")
        return self.rows.batch(epoch, index)


def run_case(folder: Path, case: dict, world) -> int:
    config = settings(folder / "base", output=str(folder / case.get("output", case["name"])), **case["settings"])
    rows = source(case.get("samples", 40), micro_batch=config.micro_batch, seq_len=config.seq_len)
    if "die" in case and case["die"][0] == world.rank:
        rows = Dying(rows, *case["die"][1:])
    seen: dict = {}
    train = run.train

    def watched(model, optimizer, *rest):
        parameters = [p.detach() for p in model.parameters()]
        seen["held"] = sum(local(p).numel() for p in parameters)
        seen["total"] = sum(p.numel() for p in parameters)
        seen["states"] = sum(t.numel() for t in optimizer.state()[0].values())
        seen["trained"] = sum(p.numel() for p in optimizer.parameters.values())
        return train(model, optimizer, *rest)

    run.train = watched
    said: list[str] = []
    evaluation = source(3, seed=2) if config.eval_data else None
    code = run.tune(config, lambda config, base: run.Data(rows, evaluation), said.append, world)
    run.train = train
    found = seen | {"code": code, "said": said, "rank": world.rank, "size": world.size}
    (folder / f"{case['name']}.{world.rank}.json").write_text(json.dumps(found))
    return code


def main() -> int:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    cases = json.loads((folder / "cases.json").read_text())
    return together("cpu", lambda world: max(run_case(folder, case, world) for case in cases))


if __name__ == "__main__":
    sys.exit(main())
