"""Two processes over gloo train as one does with twice the accumulation, however the network is spread over them."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tune.tiny import hf_model, result_of, save_hf, settings, source, tune_tiny

from qwenfit.errors import QwenfitError

METHODS = {"lora": 3e-3, "lora-emb": 3e-3, "full": 1e-3, "qlora": 3e-3}
STEPS = 4
MISSING = importlib.util.find_spec("deepspeed") is None
SKIPPED = MISSING and os.environ.get("CI") != "true"  # CI must run what a laptop may skip
needs_deepspeed = pytest.mark.skipif(SKIPPED, reason="deepspeed is not installed: pip install 'qwenfit[deepspeed]'")

# How a network is spread: the name of the way, and its settings.
TORCH = {"copies": {"zero": 0}, "zero2": {"zero": 2}, "zero3": {"zero": 3}}
DEEPSPEED = {"deepspeed3": {"zero": 3, "deepspeed": True}, "deepspeed2": {"zero": 2, "deepspeed": True}}
WAYS = TORCH if MISSING else TORCH | DEEPSPEED
SHARDED = [*list(TORCH)[1:], *(pytest.param(way, marks=needs_deepspeed) for way in DEEPSPEED)]
ALL = ["copies", *SHARDED]

UNEVEN = {"max_steps": None, "epochs": 1.0, "eval_data": "x"}  # 26 samples are 13 micro-batches: 4, 4, 4 and one
NAN_TOKEN = 17  # whose embedding is NaN in the model "nan": the loss of some steps is, then
DROPOUT = {"lora_dropout": 0.1, "save_every": 2}
LARGE = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12}
STOPPED = ["lora-copies", "lora-emb-zero2", "full-zero3"]  # and gone on with
STOPPED += [] if MISSING else ["bf16-deepspeed2", "lora-emb-deepspeed3"]


def case(name: str, **changes) -> dict:
    method = changes.get("method", "lora")
    base = {"max_steps": STEPS, "lr": METHODS[method], "grad_accum": 2}
    return {"name": name, "settings": base | ({"precision": "int4"} if method == "qlora" else {}) | changes}


def cases() -> list[dict]:
    found = [case("large", zero=3, max_steps=1, lora_rank=4) | {"base": "large"}]  # first: its memory is measured
    found += [case(f"{m}-{way}", method=m, **s) for m in ("lora", "lora-emb", "full") for way, s in WAYS.items()]
    found += [case("qlora-copies", method="qlora"), case("dropout", zero=3, **DROPOUT)]
    for way in ("zero3", "deepspeed2", "deepspeed3"):
        if way in WAYS:
            found += [case(f"bf16-{way}", method="full", precision="bf16", **WAYS[way])]
            found += [case(f"nan-{way}", max_bad_steps=5, **WAYS[way]) | {"base": "nan"}]
            found += [case(f"tied-{way}", method="full", **UNEVEN, **WAYS[way]) | {"samples": 26, "base": "tied"}]
    for straight in [each for each in found if each["name"] in STOPPED]:
        name, changes = straight["name"], straight["settings"]
        found += [{"name": f"{name}-stopped", "settings": changes, "die": [1, 5, "stop"]}]  # in the third step
        found += [{"name": f"{name}-resumed", "output": f"{name}-stopped", "settings": changes | {"resume": True}}]
    return found


def losses(output: Path) -> list[float | None]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def rank(folder: Path, name: str, number: int) -> dict:
    return json.loads((folder / f"{name}.{number}.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, launch) -> Path:
    """Every case, run by two processes; before them, a run of which one process was killed."""
    folder = tmp_path_factory.mktemp("processes")
    save_hf(folder / "base")
    save_hf(folder / "tied", tied=True)
    hf_model(**LARGE).save_pretrained(folder / "large")
    spoilt = hf_model()
    spoilt.get_input_embeddings().weight.data[NAN_TOKEN] = float("nan")
    spoilt.save_pretrained(folder / "nan")
    cut = case("cut", zero=3, **DROPOUT)
    killed = launch(folder, [cut | {"die": [1, 5, "kill"]}])  # in step 3
    (folder / "killed.json").write_text(json.dumps([killed.codes, killed.err]))
    again = case("cut-resumed", zero=3, **DROPOUT, resume=True) | {"output": "cut"}
    done = launch(folder, [*cases(), again])
    assert done.codes == [0, 0], done.errors()
    return folder


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, list[float]]:
    """The losses of one process with twice the accumulation."""
    wanted = [case(m, method=m, grad_accum=4) for m in METHODS]
    wanted += [case("bf16", method="full", precision="bf16", grad_accum=4)]
    wanted += [case("tied", method="full", grad_accum=4, **UNEVEN) | {"base": "tied"}]
    wanted += [case("nan", grad_accum=4, max_bad_steps=5) | {"base": "nan"}]
    found = {}
    for each in wanted:
        name, output = each["name"], folder / f"alone-{each['name']}"
        config = settings(folder / each.get("base", "base"), output=str(output), **each["settings"])
        data = source(26, seq_len=24) if name == "tied" else None
        tune_tiny(config, data=data, evaluation=source(3, seed=2))
        found[name] = losses(output)
    return found


@pytest.mark.parametrize("way", ALL)
@pytest.mark.parametrize("method", ["lora", "lora-emb", "full"])
def test_losses_are_those_of_one_process(folder, alone, method, way):
    assert losses(folder / f"{method}-{way}") == pytest.approx(alone[method], abs=2e-5)
    assert alone[method][0] > alone[method][1] + 0.1  # the steps do change something


def test_q_lora_trains_as_copies(folder, alone):
    assert losses(folder / "qlora-copies") == pytest.approx(alone["qlora"], abs=2e-5)
    assert alone["qlora"] != pytest.approx(alone["lora"], abs=1e-3)  # the weights are rounded


@pytest.mark.parametrize("way", SHARDED)
@pytest.mark.parametrize("method", ["lora", "lora-emb", "full"])
def test_each_process_holds_half(folder, method, way):
    copies, shards = rank(folder, f"{method}-copies", 1), rank(folder, f"{method}-{way}", 1)
    assert copies["held"] == copies["total"] == shards["total"]
    # DeepSpeed's ZeRO-2 shards gradients and optimizer states, and fills partitions up to equal sizes.
    assert shards["held"] == shards["total"] / (1 if way == "deepspeed2" else 2)
    kinds = {"copies": 2, "deepspeed": 3}["deepspeed" if "deepspeed" in way else "copies"]  # moments; and masters
    assert shards["states"] == pytest.approx(copies["states"] / 2 * kinds / 2, rel=1e-3)
    said = "\n".join(rank(folder, f"{method}-{way}", 0)["said"])
    assert f"ZeRO-{way[-1]}" in said and f"{shards['held']:,} of {shards['total']:,} parameters" in said


def test_no_process_ever_holds_the_whole_network(folder):
    seen = [rank(folder, "large", number) for number in (0, 1)]
    whole = 4 * seen[0]["total"]  # bytes
    assert whole > 80e6
    for each in seen:
        assert each["held"] == each["total"] / 2
        assert each["loading"] < 0.85 * whole  # a half, the adapters, and what a tensor is read through


@pytest.mark.parametrize("way", ["zero3", *SHARDED[2:]])
def test_16_bit_shards_train_as_a_16_bit_network(folder, alone, way):
    assert losses(folder / f"bf16-{way}") == pytest.approx(alone["bf16"], abs=1e-2)
    assert alone["bf16"][0] != alone["full"][0]


@pytest.mark.parametrize("way", ["zero3", *SHARDED[2:]])
def test_a_tied_head_and_a_last_step_that_is_short_for_some_train_as_in_one_process(folder, alone, way):
    got, wanted = (
        json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1])
        for name in (f"tied-{way}", "alone-tied")
    )
    assert len(losses(folder / f"tied-{way}")) == 4
    assert losses(folder / f"tied-{way}") == pytest.approx(alone["tied"], abs=2e-5)
    assert got["eval_loss"] == pytest.approx(wanted["eval_loss"], abs=2e-5)


@pytest.mark.parametrize("way", ["zero3", *SHARDED[2:]])
def test_a_step_whose_loss_is_no_number_changes_nothing(folder, alone, way):
    expected, found = alone["nan"], losses(folder / f"nan-{way}")
    bad = [loss is None for loss in expected]
    assert True in bad and False in bad[bad.index(True) :] and bad == [loss is None for loss in found]
    pairs = [pair for pair in zip(found, expected, strict=True) if None not in pair]
    assert [loss for loss, _ in pairs] == pytest.approx([loss for _, loss in pairs], abs=2e-5)


@pytest.mark.parametrize("way", ALL)
@pytest.mark.parametrize("method", ["lora", "lora-emb", "full"])
def test_the_result_is_written_whole(folder, alone, method, way):
    name = "model" if method == "full" else "adapter"
    wanted = load_file(next((folder / f"alone-{method}" / name).glob("*.safetensors")))
    got = load_file(next((folder / f"{method}-{way}" / name).glob("*.safetensors")))
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        torch.testing.assert_close(got[key], tensor, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", STOPPED)
def test_a_run_that_is_stopped_goes_on_bit_for_bit(folder, name):
    assert rank(folder, f"{name}-stopped", 0)["code"] == rank(folder, f"{name}-stopped", 1)["code"] == 143
    assert "Resuming from step-00000003." in rank(folder, f"{name}-resumed", 0)["said"]
    assert result_of(folder / f"{name}-stopped") == result_of(folder / name)


def test_a_killed_process_ends_the_others_by_name_and_resume_goes_on_bit_for_bit(folder):
    codes, err = json.loads((folder / "killed.json").read_text())
    assert codes == [143, -9] or codes == [1, -9]  # it hears of it from who launched them, or by the silence
    assert "Rank 1 has been silent" in err and "Rank 0 ends too" in err
    assert "Resuming from step-00000002." in rank(folder, "cut-resumed", 0)["said"]
    assert result_of(folder / "cut") == result_of(folder / "dropout")
    with pytest.raises(QwenfitError, match="was one of 2 processes, and now there are 1"):
        one = case("cut", zero=3, **DROPOUT, resume=True)["settings"]
        tune_tiny(settings(folder / "base", output=str(folder / "cut"), **one))


def test_a_failed_process_ends_the_others_by_name(folder, launch):
    done = launch(folder, [case("failed", zero=2) | {"die": [0, 3, "raise"]}])
    assert 0 not in done.codes
    assert "error: Rank 0 failed: ValueError: a sample without a head. Rank 1 ends too." in done.err


def test_what_no_process_can_do_is_refused_by_each_with_its_own_hint(folder, launch):
    done = launch(folder, [case("refused", method="qlora", zero=3)])
    assert 0 not in done.codes
    assert "ZeRO-3 cannot shard the quantized weights of Q-LoRA.\n  try: --zero 0" in done.err
    assert "--resume" not in done.err and "Traceback" not in done.err
