"""A run that is killed or stopped anywhere goes on to the same bits as one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tune.tiny import result_of, save_hf, settings, tune_tiny

from qwenfit.tune import checkpoint
from qwenfit.tune.progress import read_metrics

DROPOUT = {"lora_dropout": 0.1, "max_steps": 6, "save_every": 2, "keep_last": 2, "moments": "bf16"}
POINTS = 12
TESTS = Path(__file__).parents[1]


METHODS = {"full": {}, "lora-emb": {}, "qlora": {"precision": "int4"}}


def run_all(folder: Path, cases: list[dict]) -> dict[str, list]:
    """Name -> [exit status, newest checkpoint, file operations] of the cases, run one after the other."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed.py")), str(folder)],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def case(name: str, settings: dict = DROPOUT, output: str = "", **more) -> dict:
    return {"name": name, "output": output or name, "settings": settings, **more}


def stopped(name: str, number: int, settings: dict, position: int, times: int = 1) -> list[dict]:
    """A run that gets a signal, and the one that goes on with it."""
    first = case(name, settings, signals=[[position, number, times]])
    return [first, case(f"{name} resumed", settings | {"resume": True}, output=name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    save_hf(folder / "base")
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, list]:
    cases = [case("straight"), case("again")]
    for number in (signal.SIGTERM, signal.SIGINT):
        cases += stopped(f"stop {number:d}", number, DROPOUT, 5)
    cases += stopped("twice", signal.SIGTERM, DROPOUT, 5, times=2)
    for method, more in METHODS.items():
        changes = DROPOUT | {"method": method, "save_every": 3, "max_steps": 4} | more
        cases += [case(method, changes), *stopped(f"{method} stopped", signal.SIGTERM, changes, 3)]
    return run_all(folder, cases)


def test_the_same_run_twice_gives_the_same_bits(folder, runs):
    assert runs["straight"][0] == runs["again"][0] == 0
    assert result_of(folder / "straight") == result_of(folder / "again")


def test_a_run_that_is_killed_anywhere_in_a_save_resumes_to_the_same_bits(folder, runs):
    per_save = runs["straight"][2] // 3
    points = [per_save + 1 + i * per_save // POINTS for i in range(POINTS)]  # within the second of three saves
    assert len(set(points)) == POINTS
    cases = []
    for p in points:
        cases += [case(f"die {p}", die_at=p), case(f"die {p} resumed", DROPOUT | {"resume": True}, output=f"die {p}")]
    found = run_all(folder, cases)
    killed, resumed = ([found[f"die {p}{end}"] for p in points] for end in ("", " resumed"))
    assert {status for status, *_ in killed} == {-signal.SIGKILL}
    assert {newest for _, newest, _ in killed} == {"step-00000002", "step-00000004"}  # before the rename, and after
    assert {status for status, *_ in resumed} == {0}
    for p in points:
        output = folder / f"die {p}"
        assert result_of(output) == result_of(folder / "straight"), p
        assert sorted(c.name for c in (output / "checkpoints").iterdir()) == ["step-00000004", "step-00000006"]
        assert [row["step"] for row in read_metrics(output)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_step_finish_and_saves_it(folder, runs, number):
    assert runs[f"stop {number:d}"][:2] == [128 + number, "step-00000003"]  # it came in the third step
    assert runs[f"stop {number:d} resumed"][0] == 0
    assert result_of(folder / f"stop {number:d}") == result_of(folder / "straight")


def test_a_second_signal_leaves_at_once(runs):
    assert runs["twice"][:2] == [143, "step-00000002"]  # the third step was not waited for


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_to_the_same_bits(folder, runs, method):
    assert [runs[name][0] for name in (method, f"{method} stopped", f"{method} stopped resumed")] == [0, 143, 0]
    assert result_of(folder / method) == result_of(folder / f"{method} stopped")


def test_a_damaged_checkpoint_is_passed_over_and_named(folder, runs):
    shutil.copytree(folder / "straight", folder / "damaged")
    newest = folder / "damaged" / "checkpoints" / "step-00000006" / "optimizer.safetensors"
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1  # one bit
    newest.write_bytes(content)
    found, wrong = checkpoint.newest(folder / "damaged" / "checkpoints")
    assert found is not None and found.name == "step-00000004"
    assert wrong == ["step-00000006 does not verify (optimizer.safetensors has changed)."]
    said: list[str] = []
    tune_tiny(settings(folder / "base", output=str(folder / "damaged"), **DROPOUT, resume=True), said.append)
    assert wrong[0] in said and "Resuming from step-00000004." in said
    assert result_of(folder / "damaged") == result_of(folder / "straight")
