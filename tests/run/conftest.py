"""A tiny Qwen2 with a real tokenizer, and the command line in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))
from fixtures_tokenizer import small_folder
from models import qwen2_config, qwen2_tensors, write_model

__all__ = ["small_folder"]
ROOT = Path(__file__).parents[2]
Result = subprocess.CompletedProcess[str]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would change an answer, one thread, and no network."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("QWENFIT_", "HF_", "COVERAGE"))}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "dumb"} | changes


@pytest.fixture
def cli(tmp_path: Path) -> Callable[..., Result]:
    """`cli("verb", ...)` runs qwenfit in tmp_path; every call is checked for a traceback."""

    def run(*arguments: object, stdin: str = "", **env: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "qwenfit", *map(str, arguments)],
            cwd=tmp_path, env=environment(**env), input=stdin, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert "Traceback" not in done.stderr + done.stdout, done.stderr
        return done

    return run


@pytest.fixture(scope="session")
def tiny(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of 2 layers with random weights and the small tokenizer; a context long enough to be interrupted in."""
    config: dict[str, Any] = qwen2_config(vocab_size=640, max_position_embeddings=32768, torch_dtype="float32")
    tensors = qwen2_tensors(config, torch.float32)
    folder = write_model(tmp_path_factory.mktemp("models") / "tiny", config, tensors)
    for file in small_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [578, 576]}))
    return folder
