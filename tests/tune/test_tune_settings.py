"""Settings of `qwenfit tune` that cannot be: one sentence each, before data or weights are read."""

from __future__ import annotations

import pytest
from tune.tiny import hf_model

from qwenfit.detect import cpu_host
from qwenfit.errors import UsageError
from qwenfit.hardware import find_device
from qwenfit.tune import planned
from qwenfit.tune.config import TuneConfig, make_config, read_yaml
from qwenfit.tune.planned import plan_tune


@pytest.mark.parametrize("text", ["seq_len: 64\nseq_len: 128\n", "seq-len: 64\nseq_len: 128\n"])
def test_a_setting_that_a_file_has_twice_is_refused(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(f"model: m\n{text}")
    with pytest.raises(UsageError, match="twice"):
        read_yaml(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": ""}, "has no name"),
        ({"precision": "fp16"}, "must be one of bf16, fp32, int8, int4"),
        ({"seq_len": 1}, "at least 2"),
        ({"lr": float("nan")}, "must be a number"),
        ({"seq_len": True}, "must be a whole number"),
        ({"data": [1]}, "must be a list of file names"),
    ],
)
def test_a_value_that_cannot_be_names_its_setting(settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        make_config({"model": "m", **settings})
    assert next(iter(settings)) in caught.value.message or caught.value.hint == "--output FOLDER"


@pytest.mark.parametrize(
    ("settings", "hint"),
    [
        ({"method": "qlora", "precision": "fp32"}, "--precision int4, or --method lora"),
        ({"method": "qlora", "precision": "bf16"}, "--precision int4, or --method lora"),
        ({"method": "lora", "precision": "int4"}, "--method qlora"),
        ({"method": "lora", "seq_len": 257}, "--seq-len 256"),
        ({"method": "lora", "offload": True}, "Leave --offload out."),
    ],
)
def test_what_a_method_or_a_model_cannot_do_is_refused_with_a_flag_of_this_verb(tmp_path, settings, hint):
    hf_model().config.save_pretrained(tmp_path)
    fitting = {"seq_len": 64, "device": "cpu"}
    with pytest.raises(UsageError) as caught:
        plan_tune(TuneConfig(str(tmp_path), **fitting | settings))
    assert caught.value.hint == hint


def test_a_gpus_setting_is_refused_where_no_gpu_is_found_not_only_where_the_cpu_is_named(tmp_path, monkeypatch):
    hf_model().config.save_pretrained(tmp_path)
    monkeypatch.setattr(planned, "run_device", lambda name: cpu_host())
    with pytest.raises(UsageError, match="this run is on the CPU"):
        plan_tune(TuneConfig(str(tmp_path), seq_len=64, offload=True))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_float32_is_planned_at_the_speed_of_float32(tmp_path, monkeypatch, method):
    """An A100 has 312 TFLOP/s in bf16 and 19.5 in float32: what computes takes 16 times as long."""
    monkeypatch.setattr(planned, "run_device", lambda name: find_device("A100-SXM4-80GB"))
    narrow, wide = (
        plan_tune(TuneConfig("Qwen2.5-0.5B", method=method, precision=precision)).speed for precision in (None, "fp32")
    )
    assert wide.terms["compute"] == pytest.approx(16 * narrow.terms["compute"], rel=0.01)
    assert wide.seconds_per_iter > 4 * narrow.seconds_per_iter
