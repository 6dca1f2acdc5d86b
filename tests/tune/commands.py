"""`qwenfit` command lines, each in a process of its own, forked from one that has imported torch and computed nothing.

    python commands.py < a JSON list of {"name", "words", and where wanted "path": a folder of modules, "write": [file,
    text] before it}

Prints one JSON object: name -> [exit status, stdout, stderr].
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import torch._dynamo  # checkpointing asks for it: slow to import, so before the forks

import qwenfit.cli_tune
import qwenfit.tune.verb  # noqa: F401
from qwenfit.cli import main as qwenfit_main


def run(order: dict) -> list:
    if "write" in order:
        Path(order["write"][0]).write_text(order["write"][1])
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        child = os.fork()
        if child == 0:
            for number, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
            sys.path[:0] = [order["path"]] if "path" in order else []
            code = 99
            try:
                qwenfit_main(order["words"])
            except SystemExit as end:
                code = end.code
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return [status, out.read_text(), err.read_text()]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({order["name"]: run(order) for order in json.load(sys.stdin)}))
