"""Two processes over gloo train as one does with twice the accumulation, however the network is spread over them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tune.tiny import result_of, save_hf, settings, source, tune_tiny

ROOT = Path(__file__).parents[3]
METHODS = {"lora": 3e-3, "lora-emb": 3e-3, "full": 1e-3}
STEPS = 4


@dataclass
class Launched:
    code: int
    out: str
    err: str


def launch(folder: Path, cases: list[dict]) -> Launched:
    """torchrun with two processes over these cases."""
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).with_name("ranks.py")), str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return Launched(done.returncode, done.stdout, done.stderr)


def case(name: str, **changes) -> dict:
    base = {"max_steps": STEPS, "lr": METHODS[changes.get("method", "lora")], "grad_accum": 2}
    return {"name": name, "settings": base | changes}


def losses(output: Path) -> list[float]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def rank(folder: Path, name: str, number: int) -> dict:
    return json.loads((folder / f"{name}.{number}.json").read_text())


UNEVEN = {"max_steps": None, "epochs": 1.0, "eval_data": "x"}  # 26 samples are 13 micro-batches: 4, 4, 4 and one


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Every case of the parity tests, run by one torchrun."""
    folder = tmp_path_factory.mktemp("processes")
    save_hf(folder / "base")
    cases = [case(f"{m}-{z}", method=m, zero=z) for m in METHODS for z in (0, 2, 3)]
    cases += [case("bf16-3", method="full", zero=3, precision="bf16")]
    cases += [case("uneven-3", zero=3, **UNEVEN) | {"samples": 26}]
    done = launch(folder, cases)
    assert done.code == 0, _errors(done)
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, list[float]]:
    """The losses of one process with twice the accumulation."""
    cases = [case(f"alone-{m}", method=m, grad_accum=4) for m in METHODS]
    cases += [case("alone-bf16", method="full", precision="bf16", grad_accum=4)]
    cases += [case("alone-uneven", grad_accum=4, **UNEVEN)]
    for each in cases:
        data = source(26, seq_len=24) if "uneven" in each["name"] else None
        output = str(folder / each["name"])
        tune_tiny(settings(folder / "base", output=output, **each["settings"]), data=data, evaluation=source(3, seed=2))
    return {each["name"].removeprefix("alone-"): losses(folder / each["name"]) for each in cases}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_losses_are_those_of_one_process(folder, alone, method, zero):
    assert losses(folder / f"{method}-{zero}") == pytest.approx(alone[method], abs=2e-5)
    assert alone[method][0] > alone[method][1] + 0.1  # the steps do change something


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("zero", [2, 3])
def test_each_process_holds_half(folder, method, zero):
    copies, shards = rank(folder, f"{method}-0", 1), rank(folder, f"{method}-{zero}", 1)
    assert copies["held"] == copies["total"] == shards["total"]
    assert shards["held"] == shards["total"] / 2
    assert shards["states"] == copies["states"] / 2
    said = rank(folder, f"{method}-{zero}", 0)["said"]
    assert any(f"ZeRO-{zero}" in line and f"{shards['held']:,} of {shards['total']:,}" in line for line in said)


def test_16_bit_shards_train_as_a_16_bit_network(folder, alone):
    assert losses(folder / "bf16-3") == pytest.approx(alone["bf16"], abs=5e-3)
    assert alone["bf16"][0] != alone["full"][0]


def test_a_last_step_that_is_short_for_some_is_trained_once(folder, alone):
    got, wanted = (
        json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in ("uneven-3", "alone-uneven")
    )
    assert len(losses(folder / "uneven-3")) == 4
    assert losses(folder / "uneven-3") == pytest.approx(alone["uneven"], abs=2e-5)
    assert got["eval_loss"] == pytest.approx(wanted["eval_loss"], abs=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_written_whole(folder, alone, method):
    from safetensors.torch import load_file

    name = "model" if method == "full" else "adapter"
    wanted = load_file(next((folder / f"alone-{method}" / name).glob("*.safetensors")))
    for zero in (0, 2, 3):
        got = load_file(next((folder / f"{method}-{zero}" / name).glob("*.safetensors")))
        assert got.keys() == wanted.keys()
        for key, tensor in wanted.items():
            torch.testing.assert_close(got[key], tensor, atol=2e-4, rtol=1e-3)


def test_a_killed_process_ends_the_others_by_name_and_resume_goes_on_bit_for_bit(folder):
    changes = {"zero": 3, "lora_dropout": 0.1, "save_every": 2}
    cut = case("cut", **changes) | {"die": [1, 5, "kill"]}  # in step 3
    done = launch(folder, [case("uncut", **changes), cut])
    assert done.code != 0
    assert "Rank 1 has been silent" in done.err and "Rank 0 ends too" in done.err
    assert [p.name for p in (folder / "cut/checkpoints").iterdir() if p.name.startswith("step")] == ["step-00000002"]
    again = launch(folder, [case("cut", **changes, resume=True)])
    assert again.code == 0, again.err
    assert "Resuming from step-00000002." in rank(folder, "cut", 0)["said"]
    assert result_of(folder / "cut") == result_of(folder / "uncut")
    with pytest.raises(Exception, match="was one of 2 processes, and now there are 1"):
        one = case("cut", **changes, resume=True)["settings"]
        tune_tiny(settings(folder / "base", output=str(folder / "cut"), **one))


def test_a_failed_process_ends_the_others_by_name(folder):
    done = launch(folder, [case("failed", zero=2) | {"die": [0, 3, "raise"]}])
    assert done.code != 0
    assert "error: Rank 0 failed: ValueError: a sample without a head. Rank 1 ends too." in done.err


def _errors(done: Launched) -> str:
    return "\n".join(line for line in done.err.splitlines() if not line.startswith("step "))[:4000]
