"""Model folders that somebody made to break the reader, as a user meets them: one sentence, exit code 5, soon."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenfit.checkpoint.config_json import config_from_dict, read_config_json
from qwenfit.checkpoint.tokenizer import load_tokenizer
from qwenfit.errors import BadFile
from tests.run.conftest import environment

SECONDS = 100  # of a whole start on a busy machine
BYTES = 1 << 30  # of which torch and what it brings take a third
# The command line, which leaves behind what the kernel knows of it. (ru_maxrss would count the parent's peak too.)
WATCHED = """
import atexit, pathlib, runpy, sys
left = pathlib.Path(sys.argv.pop(1))
atexit.register(lambda: left.write_text(pathlib.Path("/proc/self/status").read_text()))
runpy.run_module("qwenfit", run_name="__main__")
"""


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    table = json.loads(path.read_text()) if path.exists() else {}
    change(table)
    path.write_text(json.dumps(table))


def read_tokenizer(folder: Path) -> object:
    return load_tokenizer(folder, config_from_dict(read_config_json(folder / "config.json"), "model"))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t["added_tokens"].append({"id": 600, "content": "\ud800"}), "surrogate"),
        (lambda t: t["added_tokens"].append("x"), "lacks its text"),
        (lambda t: t.update(added_tokens={"a": 1}), "not a list"),
        (lambda t: t["model"].update(merges=[[1, 2]]), "pair of tokens"),
        (lambda t: t["model"]["vocab"].update(a=-5), "whole number"),
        (lambda t: t["model"]["vocab"].update(zzz=2**40), "whole number"),
        (lambda t: t.update(model=[]), "BPE"),
        (lambda t: t.update(decoder=[[]]), "decoder"),
        (lambda t: t.update(normalizer={"type": "Sequence", "normalizers": {"a": 1}}), "normalizer"),
        (lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}}), "pre-tokenizer"),
    ],
)
def test_a_tokenizer_json_that_lies(folder: Path, change: Callable[[dict[str, Any]], object], word: str) -> None:
    rewrite(folder / "tokenizer.json", change)
    with pytest.raises(BadFile, match=word):
        read_tokenizer(folder)


def test_a_vocabulary_is_refused_before_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qwenfit.checkpoint.load
    from qwenfit.engine.llm import LLM

    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(qwenfit.checkpoint.load, "load_model", never)
    with pytest.raises(AssertionError, match="weights were read"):
        LLM(str(folder), device="cpu")
    rewrite(folder / "tokenizer.json", lambda t: t.update(model=[]))
    with pytest.raises(BadFile, match="BPE"):
        LLM(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("generation_config.json", '{"eos_token_id": [[1], 2]}'),
        ("generation_config.json", '{"eos_token_id": 1e400}'),
        ("generation_config.json", '{"eos_token_id": {"a": 1}}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"%s": {"content": "a"}}}' % ("9" * 5000)),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"\u00b2": {"content": "a"}}}'),
        ("tokenizer_config.json", '{"chat_template": {"a": 1}}'),
        ("tokenizer.json", '{"model": ' * 5000),
    ],
)
def test_odd_files_beside_the_tokenizer(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(BadFile):
        read_tokenizer(folder)


def grow(path: Path) -> None:
    """A file of 1 GiB that takes no room on the disk."""
    with path.open("wb") as file:
        file.truncate(1 << 30)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def endless_template(path: Path) -> None:
    path.write_text("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")


def nested(path: Path) -> None:
    path.write_text('{"model_type": "qwen2", "x": ' + "[" * 100_000)


def absurd(path: Path) -> None:
    rewrite(path, lambda t: t.update(num_hidden_layers=10**30, rms_norm_eps=-1))


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("tokenizer.json", grow),
        ("model.safetensors", a_pipe),
        ("config.json", a_pipe),
        ("chat_template.jinja", endless_template),
        ("config.json", nested),
        ("config.json", absurd),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_the_command_line_stays_short_quick_and_small(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, name: str, spoil: Callable[[Path], None]
) -> None:
    spoil(folder / name)
    started, status = time.monotonic(), tmp_path_factory.mktemp("status") / "status"
    command = [sys.executable, "-c", WATCHED, str(status), "chat", str(folder), "-p", "hi"]
    done = subprocess.run(command, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 5, done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) <= 2 and done.stdout == ""
    assert time.monotonic() - started < SECONDS
    (peak,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    assert int(peak) * 1024 < BYTES
