"""What goes wrong during a run is named, and nothing that was learned is lost."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import resource
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tune.tiny import network, result_of, samples, save_hf, settings, source, tune_tiny

from qwenfit.errors import DoesNotFit, QwenfitError, UsageError
from qwenfit.tune import checkpoint, loss, planned, progress
from qwenfit.tune.adapters import LoRALinear
from qwenfit.tune.batch import IGNORE
from qwenfit.tune.loop import Diverged
from qwenfit.tune.optimizer import AdamW
from qwenfit.tune.peft_format import load_adapter
from qwenfit.tune.progress import read_metrics
from qwenfit.tune.source import Rows


@pytest.fixture
def base(tmp_path):
    return save_hf(tmp_path / "base")


def run_of(base, **changes):
    return settings(base, output=str(base.parent / "run"), **{"max_steps": 6, "save_every": 2} | changes)


class Poisoned(Rows):
    """Hidden states that are no numbers from a sample on: its tokens meet an embedding that is NaN."""

    TOKEN = 319

    def __init__(self, first: int, last: int) -> None:
        few = samples(24, longest=20)
        for sample in few:
            sample.input_ids = [min(i, self.TOKEN - 1) for i in sample.input_ids]
            sample.labels = [i if i == IGNORE else min(i, self.TOKEN - 1) for i in sample.labels]
        for sample in few[first:last]:
            sample.input_ids[0] = self.TOKEN
        super().__init__([[s] for s in few], 24, 2, 0, shuffle=False)


@pytest.fixture
def poison(monkeypatch):
    """The last token's embedding is NaN: a sample that holds it makes the loss one."""
    from qwenfit.tune import world

    load = world.load_model

    def loaded(*arguments, **options):
        model, config = load(*arguments, **options)
        model.embed_tokens.weight.data[Poisoned.TOKEN] = float("nan")
        return model, config

    monkeypatch.setattr(world, "load_model", loaded)


def test_a_batch_of_nan_stops_after_m_steps_names_the_samples_and_keeps_the_last_good_state(base, poison):
    with pytest.raises(Diverged) as caught:
        tune_tiny(run_of(base, max_bad_steps=2), data=Poisoned(8, 24))  # 4 samples a step: from the third step on
    assert "train.jsonl:13" in caught.value.message and "after step 2 is saved" in caught.value.message
    found, wrong = checkpoint.newest(base.parent / "run" / "checkpoints")
    assert found is not None and found.name == "step-00000002" and not wrong
    rows = read_metrics(base.parent / "run")
    assert [("bad" in row) for row in rows] == [False, False, True, True]
    assert [row["loss"] is None for row in rows] == [False, False, True, True]
    lines = (base.parent / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in lines and "Infinity" not in lines  # JSON has neither
    assert rows[2]["bad"] == [f"train.jsonl:{n}" for n in (9, 10, 11, 12)]
    model = network(base)
    load_adapter(model, model.config, found)
    assert all(p.isfinite().all() for p in model.parameters())
    # What is offered is possible: past them, to the end. Other settings are refused, as ever.
    assert "--resume --max-bad-steps 20" in caught.value.hint
    assert tune_tiny(run_of(base, max_bad_steps=20, resume=True), data=Poisoned(8, 24)) == 0
    assert [("bad" in row) for row in read_metrics(base.parent / "run")] == [False, False, True, True, True, True]


def test_fewer_bad_steps_are_left_out_and_the_run_goes_on(base, poison):
    assert tune_tiny(run_of(base, max_bad_steps=2), data=Poisoned(8, 12)) == 0
    rows = read_metrics(base.parent / "run")
    assert [row["step"] for row in rows if "bad" in row] == [3]
    state = json.loads((base.parent / "run" / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["state"]["bad_steps"] == 0 and state["optimizer"][0]["steps"] == 5


def test_a_full_disk_leaves_the_earlier_checkpoint_and_says_which(base, monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    written = checkpoint.save
    try:

        def save(root, step, write, **options):
            if step == 4:  # no file of more than 20 KB from here on: the optimizer's does not fit
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
            return written(root, step, write, **options)

        monkeypatch.setattr(checkpoint, "save", save)
        with pytest.raises(QwenfitError) as caught:
            tune_tiny(run_of(base))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "step-00000002 is untouched" in caught.value.message and "--resume" in caught.value.hint
    root = base.parent / "run" / "checkpoints"
    assert [p.name for p in root.iterdir()] == ["step-00000002"]
    monkeypatch.setattr(checkpoint, "save", written)
    assert tune_tiny(run_of(base, resume=True)) == 0
    straight = replace(run_of(base), output=str(base.parent / "straight"))
    assert tune_tiny(straight) == 0
    assert result_of(base.parent / "run") == result_of(base.parent / "straight")


def test_a_folder_that_becomes_read_only_leaves_the_earlier_checkpoint_and_says_which(base, monkeypatch):
    mkdir = Path.mkdir

    def refused(path, *rest, **options):
        if path.name == ".tmp-00000004":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        mkdir(path, *rest, **options)

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(QwenfitError, match="Read-only file system; step-00000002 is untouched"):
        tune_tiny(run_of(base))
    assert not checkpoint.problem(base.parent / "run" / "checkpoints" / "step-00000002")


def test_metrics_that_cannot_be_written_end_the_run_in_one_sentence(base, monkeypatch):
    class Full:
        def write(self, text):
            if '"step": 4' in text:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self): ...

        def close(self): ...

    begun = progress.Progress.__init__

    def init(self, *arguments):
        begun(self, *arguments)
        self.file.close()
        self.file = Full()

    monkeypatch.setattr(progress.Progress, "__init__", init)
    with pytest.raises(QwenfitError, match="No space left on device; step-00000002 is untouched") as caught:
        tune_tiny(run_of(base))
    assert "--resume" in caught.value.hint


@pytest.mark.parametrize(("method", "result"), [("lora", "adapter"), ("full", "model")])
def test_a_folder_that_is_no_runs_result_is_not_replaced(base, method, result):
    mine = base.parent / "run" / result
    mine.mkdir(parents=True)
    (mine / "precious").write_text("")
    for resume in (False, True):
        with pytest.raises(UsageError, match="would replace it"):
            tune_tiny(run_of(base, method=method, resume=resume))
    assert (mine / "precious").exists()


def test_too_little_room_is_said_before_the_first_step(base, monkeypatch):
    from qwenfit.tune import setup

    monkeypatch.setattr(setup.shutil, "disk_usage", lambda path: SimpleNamespace(free=10_000))
    with pytest.raises(QwenfitError, match="one being written"):
        tune_tiny(run_of(base))
    assert not (base.parent / "run" / "checkpoints").exists()


def test_a_folder_that_takes_no_files_is_named_before_weights_are_read(base, monkeypatch):
    from qwenfit.tune import world

    monkeypatch.setattr(world, "load_model", lambda *a, **k: pytest.fail("weights were read"))
    (base.parent / "file").write_text("")
    with pytest.raises(QwenfitError, match="Nothing can be written"):
        tune_tiny(replace(run_of(base), output=str(base.parent / "file" / "run")))
    if os.geteuid() != 0:  # root writes anywhere
        locked = base.parent / "locked"
        locked.mkdir(mode=0o555)
        with pytest.raises(QwenfitError, match="Permission denied"):
            tune_tiny(replace(run_of(base), output=str(locked)))


def fail_with_out_of_memory(*arguments, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("where", "term"),
    [
        ((loss, "chunk_tokens"), "logits"),
        ((AdamW, "_gather"), "optimizer"),
        ((LoRALinear, "forward"), "activations"),
    ],
)
def test_running_out_of_memory_names_the_plans_term_and_the_next_smaller_setting(base, monkeypatch, where, term):
    monkeypatch.setattr(*where, fail_with_out_of_memory)
    with pytest.raises(DoesNotFit) as caught:
        tune_tiny(run_of(base, micro_batch=4, grad_accum=2))
    assert f"plan's {term}" in caught.value.message
    assert caught.value.hint.startswith("--micro-batch 2 --grad-accum 4")


def test_the_next_smaller_settings_come_in_the_order_of_what_they_cost(base):
    config = run_of(base, micro_batch=2, keep="all", seq_len=256, method="lora-emb")
    flags = [flag for flag, _ in planned._smaller(config, "cpu")]
    assert flags[0].startswith("--micro-batch 1") and flags[1] == "--keep inputs" and "--offload" not in flags
    assert "--method lora" in flags and flags[-1] == "--optimizer 8bit"
    assert [flag for flag, _ in planned._smaller(config, "gpu")] == [*flags[:3], "--offload", *flags[3:]]


def test_another_error_is_not_taken_for_one_of_memory(base, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(loss, "chunk_tokens", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        tune_tiny(run_of(base))


def test_what_does_not_fit_is_refused_before_weights_are_read(base, monkeypatch):
    from qwenfit.tune import world

    monkeypatch.setattr(world, "load_model", lambda *a, **k: pytest.fail("weights were read"))
    config = run_of(base, seq_len=256, micro_batch=1_000_000)
    with pytest.raises(DoesNotFit, match="free"):
        tune_tiny(config, data=source())
    assert not (base.parent / "run").exists()


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(base):
    assert tune_tiny(run_of(base, max_steps=2)) == 0
    with pytest.raises(UsageError, match="holds a run"):
        tune_tiny(run_of(base, max_steps=2))
    with pytest.raises(UsageError, match="had lr = "):
        tune_tiny(run_of(base, max_steps=2, resume=True, lr=1e-3))
    assert tune_tiny(run_of(base, max_steps=2, resume=True, save_every=1)) == 0  # changes no numbers


def test_the_command_to_try_is_one_that_a_shell_takes(base):
    said: list[str] = []
    output = str(base.parent / "my first run")
    assert tune_tiny(replace(run_of(base, max_steps=1), output=output), said.append) == 0
    assert shlex.split(said[-1].partition("Try it: ")[2]) == [
        "qwenfit",
        "chat",
        str(base),
        "--adapter",
        f"{output}/adapter",
    ]


def test_one_process_that_is_to_shard_says_that_it_holds_everything(base):
    said: list[str] = []
    assert tune_tiny(run_of(base, max_steps=2, zero=3), said.append) == 0
    assert any("ZeRO-3 has nothing to shard over" in text for text in said)


def test_early_stopping_keeps_the_best_evaluation(base):
    said: list[str] = []
    config = run_of(base, max_steps=40, eval_every=2, patience=3, eval_data=["held-out"], lr=0.1, keep_last=1)
    assert tune_tiny(config, said.append, evaluation=source(6, seed=9)) == 0
    rows = [row for row in read_metrics(base.parent / "run") if "eval_loss" in row]
    best = min(rows, key=lambda row: row["eval_loss"])
    assert len(rows) < 20 and rows[-1]["step"] == best["step"] + 6
    assert any(f"adapter of step {best['step']} is in" in text for text in said)
    kept = base.parent / "run" / "checkpoints" / f"step-{best['step']:08d}" / "adapter_model.safetensors"
    assert kept.read_bytes() == (base.parent / "run" / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_run_leaves_its_metrics_and_a_picture(base):
    assert tune_tiny(run_of(base)) == 0
    rows = read_metrics(base.parent / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "lr", "tokens_per_s", "memory", "planned_memory", "gradient_norm", "epoch"):
        assert all(row[name] >= 0 for row in rows), name
    image = (base.parent / "run" / "loss.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) > 1000


@pytest.mark.parametrize("width", [80, 140])
def test_the_bar_of_a_terminal_shows_loss_speed_memory_and_time_left_whole(base, monkeypatch, width):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    for name, value in {"COLUMNS": str(width), "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    assert tune_tiny(run_of(base)) == 0
    shown = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line) for line in re.split(r"[\r\n]+", terminal.getvalue())]
    last = [line for line in shown if "6/6" in line][-1]
    assert re.search(
        r"━{3,} .*6/6 +loss \d+\.\d{4} +[\d,]+ trained tokens/s +\d+\.\d\d of \d+\.\d\d GB.* 0:00:00 left", last
    )
    assert len(last.rstrip()) <= width
