"""A finetuning plan's command is one that torchrun and the trainer take, and it means what was planned."""

from __future__ import annotations

import shlex

import pytest
from torch.distributed.run import get_args_parser

import qwenfit
from qwenfit.errors import UsageError
from qwenfit.tune.config import TuneConfig, make_config
from qwenfit.tune.distributed import zero_stage

CASES = [
    ("full", {"gpus": 8}, 3),
    ("full", {"gpus": 8, "nodes": 2, "zero": 2}, 2),
    ("lora", {"gpus": 2, "optimizer": "8bit", "lora_rank": 8, "checkpointing": False}, 2),
    ("lora-emb", {"gpus": 4, "zero": 3, "micro_batch": 2, "grad_accum": 4}, 3),
    ("qlora", {"gpus": 2, "nodes": 2}, 0),
    ("qlora", {"gpus": 2, "precision": "int8", "seq_len": 512}, 0),
    ("lora", {"gpus": 1}, 2),
]


def parsed(words: list[str]) -> TuneConfig:
    """The trainer's settings from MODEL and --flag value pairs."""
    flags = dict(zip(words[1::2], words[2::2], strict=True))
    whole = ("seq_len", "micro_batch", "grad_accum", "lora_rank", "zero")
    values = {name.removeprefix("--").replace("-", "_"): value for name, value in flags.items()}
    return make_config({"model": words[0]} | {k: int(v) if k in whole else v for k, v in values.items()})


@pytest.mark.parametrize(("method", "sizes", "stage"), CASES)
def test_a_planned_command_does_what_was_planned(method, sizes, stage):
    made = qwenfit.plan("Qwen-7B", task=method, gpu="A100-SXM4-80GB", **sizes)
    words = shlex.split(made.command)
    gpus, nodes = sizes.get("gpus", 1), sizes.get("nodes", 1)
    if gpus * nodes > 1:
        assert words.pop(0) == "torchrun"
        given = get_args_parser().parse_args([w.replace("$NODE_RANK", "1") for w in words])
        assert (given.nproc_per_node, given.nnodes) == (str(gpus), str(nodes) if nodes > 1 else "1:1")
        assert (given.module, given.training_script) == (True, "qwenfit")
        words = given.training_script_args
    else:
        assert words.pop(0) == "qwenfit"
    assert words[0] == "tune"
    config = parsed(words[1:])
    assert zero_stage(config, gpus * nodes) == stage
    task = made.task
    got = (config.method, config.seq_len, config.micro_batch, config.grad_accum, config.optimizer)
    assert got == (task.method, task.seq_len, task.micro_batch, task.grad_accum, task.optimizer)
    assert method == "full" or config.lora_rank == task.lora_rank
    assert (config.keep == "all") is not task.checkpointing
    assert made.precision == {"qlora": config.precision or "int4"}.get(method, "bf16")


def test_sharded_4_bit_weights_are_refused():
    with pytest.raises(UsageError, match="cannot be sharded") as caught:
        zero_stage(TuneConfig("m", method="qlora", zero=3), 2)
    assert caught.value.hint == "--zero 0"
    for zero in (2, 3):  # and a plan for it gives no command that is refused later
        with pytest.raises(UsageError, match="cannot shard") as planned:
            qwenfit.plan("Qwen-7B", task="qlora", gpu="A100-SXM4-80GB", gpus=2, zero=zero)
        assert planned.value.hint == "--zero 0"
    assert qwenfit.plan("Qwen-7B", task="qlora", gpu="A100-SXM4-80GB", gpus=2, zero=2, stack="transformers-4.3x")


def test_single_rows_of_a_sharded_table_are_refused():
    with pytest.raises(UsageError, match="sharded embedding"):
        zero_stage(TuneConfig("m", method="lora", new_tokens=True), 2)
