"""An adapter tells the base model that it was trained on from another of equal shapes, and says so without refusing."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tune.tiny import hf_model, save_hf, settings, tune_tiny

from qwenfit.checkpoint.resolve import resolve_model
from qwenfit.run.planned import RunOptions, load_planned
from qwenfit.tune.fingerprint import other_base
from qwenfit.tune.merge import merge


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An adapter trained on `base`, and other models: of another seed, in 16 bits, and with changed linears."""
    folder = tmp_path_factory.mktemp("fingerprint")
    save_hf(folder / "base")
    save_hf(folder / "other", seed=1)
    hf_model().half().save_pretrained(folder / "base in 16 bits")
    hf_model(seed=1).half().save_pretrained(folder / "other in 16 bits")
    tuned = hf_model()
    with torch.no_grad():
        tuned.model.layers[0].mlp.down_proj.weight.add_(1e-3)  # as a merged adapter leaves it: norms are the same
    tuned.save_pretrained(folder / "tuned")
    assert tune_tiny(settings(folder / "base", output=str(folder / "run"), max_steps=1)) == 0
    return folder


@pytest.mark.parametrize(
    ("base", "warned"),
    [("base", False), ("base in 16 bits", False), ("other", True), ("other in 16 bits", True), ("tuned", True)],
)
def test_merging_onto_another_base_is_done_and_warned_of(folder, tmp_path, base, warned):
    report = merge(folder / "run" / "adapter", tmp_path / "merged", base=str(folder / base))
    assert ("trained on other weights" in report.text) == warned
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_running_it_beside_another_base_is_warned_of_on_stderr(folder, monkeypatch, capsys):
    monkeypatch.setattr("qwenfit.engine.llm.LLM", lambda *arguments, **options: SimpleNamespace())
    for base in ("base", "other"):
        options = RunOptions(str(folder / base), adapter=str(folder / "run" / "adapter"), context=64, device="cpu")
        load_planned(options)
        assert ("trained on other weights" in capsys.readouterr().err) == (base == "other")


def test_an_adapter_without_a_fingerprint_says_nothing(folder, tmp_path):
    other = resolve_model(str(folder / "other"))
    assert other_base(tmp_path, other) == ""  # as PEFT writes it
    for record in ({}, {"precision": "fp32"}, {"base_weights": {}}, {"base_weights": "abc"}):
        (tmp_path / "qwenfit.json").write_text(json.dumps(record))
        assert other_base(tmp_path, other) == ""
