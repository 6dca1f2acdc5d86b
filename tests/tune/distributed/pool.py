"""Launches processes that train together, as torchrun does, by forking one that has imported everything.

    python pool.py < a JSON object a line: {"folder", "cases"}

For each it answers with a line: {"codes": exit status of each rank, "err": what they wrote to stderr}.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch._dynamo  # slow to import, and asked for later: before the forks
from torch.distributed import TCPStore
from tune.distributed.ranks import run_case

import qwenfit.tune.shards  # noqa: F401
from qwenfit.errors import NotFound
from qwenfit.tune.deepspeed import import_deepspeed
from qwenfit.tune.distributed import together

SIZE = 2


def fork(work) -> int:
    child = os.fork()
    if child:
        return child
    try:
        work()
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def serve(writing: int) -> None:
    """The store that the ranks meet at: in torchrun, its agent's."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=120))
    os.write(writing, str(store.port).encode())
    signal.pause()


def rank(number: int, port: int, order: dict, err: Path) -> None:
    out = os.open(err, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(out, 2)
    os.dup2(2, 1)
    os.environ |= {
        **{"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(SIZE), "LOCAL_WORLD_SIZE": str(SIZE)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RESTART_COUNT": "0"},
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    folder = Path(order["folder"])
    together("cpu", lambda world: max(run_case(folder, case, world) for case in order["cases"]))


def launch(order: dict) -> dict:
    reading, writing = os.pipe()
    store = fork(lambda: serve(writing))
    port = int(os.read(reading, 16))
    os.close(reading)
    os.close(writing)
    err = Path(order["folder"]) / "err"
    err.unlink(missing_ok=True)
    ranks = [fork(lambda n=n: rank(n, port, order, err)) for n in range(SIZE)]
    codes = wait(ranks)
    os.kill(store, signal.SIGKILL)
    os.waitpid(store, 0)
    return {"codes": codes, "err": err.read_text()}


def wait(ranks: list[int]) -> list[int]:
    """The exit status of each; when one fails the others are sent SIGTERM, as by torchrun."""
    codes: dict[int, int] = {}
    while len(codes) < len(ranks):
        time.sleep(0.05)
        for child in set(ranks) - codes.keys():
            done, status = os.waitpid(child, os.WNOHANG)
            if not done:
                continue
            codes[child] = os.waitstatus_to_exitcode(status)
            for other in set(ranks) - codes.keys() if codes[child] else ():
                os.kill(other, signal.SIGTERM)
    return [codes[child] for child in ranks]


def main() -> None:
    torch.set_num_threads(1)
    with suppress(NotFound):
        import_deepspeed(torch.device("cpu"))
        importlib.import_module("torch._inductor.compile_fx")  # as its engine does
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        print(json.dumps(launch(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
