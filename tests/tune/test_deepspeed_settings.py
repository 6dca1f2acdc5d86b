"""DeepSpeed gets the official scripts' settings, filled for the run; without the package its extra is named."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from fixtures_tokenizer import make_config

from qwenfit.errors import NotFound, UsageError
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.deepspeed import SETTINGS, import_deepspeed, settings_of
from qwenfit.tune.distributed import zero_stage


def test_zero_2_has_the_official_buckets_and_no_auto_is_left():
    config = TuneConfig("m", micro_batch=2, clip=0.5, deepspeed=True)
    got = settings_of(2, make_config(1000), config, "bf16", 8)
    assert "auto" not in json.dumps(got)
    assert got["bf16"] == {"enabled": True} and got["gradient_clipping"] == 0.5
    assert (got["train_micro_batch_size_per_gpu"], got["train_batch_size"]) == (2, 16)
    zero = got["zero_optimization"]
    assert zero["stage"] == 2 and zero["overlap_comm"] and zero["contiguous_gradients"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == 2e8
    assert zero["offload_optimizer"]["device"] == "none"


def test_zero_3_fills_in_what_follows_from_the_hidden_size():
    model = make_config(1000)
    got = settings_of(3, model, TuneConfig("m", deepspeed=True), "fp32", 2)
    assert "auto" not in json.dumps(got) and got["bf16"] == {"enabled": False}
    zero = got["zero_optimization"]
    assert zero["reduce_bucket_size"] == model.hidden_size**2
    assert zero["stage3_param_persistence_threshold"] == 10 * model.hidden_size
    assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == zero["sub_group_size"] == 1e9


def test_each_set_of_settings_names_its_source():
    table = json.loads(SETTINGS.read_text())
    assert all("@" in table["source"][stage] and table[stage] for stage in ("2", "3"))


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(NotFound, match="deepspeed, which is not installed") as caught:
        import_deepspeed(torch.device("cpu"))
    assert "qwenfit[deepspeed]" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero": 0}, "copies need none"),
        ({"method": "qlora"}, "packed and cannot be sharded"),
        ({"method": "lora", "new_tokens": True}, "sharded embedding"),
    ],
)
def test_what_deepspeed_cannot_do_is_one_sentence(changes, words):
    with pytest.raises(UsageError, match=words):
        zero_stage(TuneConfig("m", deepspeed=True, **changes), 2)
