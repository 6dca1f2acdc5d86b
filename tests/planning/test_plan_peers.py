"""The plan against measurements that no constant was fitted to (but for two of vLLM's), and against the goals.

Measured on one NVIDIA H100 80GB HBM3 (driver 580, torch 2.11), random weights of the exact Qwen shapes: vLLM 0.26,
transformers 5.17 with peft. The goals are what this project's own engine and trainer commit to on that card.
"""

from __future__ import annotations

import pytest

from qwenfit.planning.planner import plan
from qwenfit.planning.types import Plan

H100 = "H100-SXM5-80GB"


def on_h100(model: str, task: str = "inference", **options: object) -> Plan:
    return plan(model, task, gpu=H100, advise=False, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "precision", "measured"),
    [("Qwen-7B", "bf16", 151.7), ("Qwen-7B", "int8", 184.2), ("Qwen-7B", "int4", 220.3), ("Qwen-1.8B", "bf16", 409.0)],
)
def test_vllm_decodes_as_fast_as_planned(model: str, precision: str, measured: float) -> None:
    speed = on_h100(model, precision=precision, stack="vllm").speed
    assert speed.tokens_per_s == pytest.approx(measured, rel=0.15)
    assert speed.interval.low < measured < speed.interval.high


def test_vllm_decodes_72b_int4_within_its_interval() -> None:
    speed = on_h100("Qwen-72B", precision="int4", stack="vllm").speed
    assert speed.interval.low < 43.6 <= speed.interval.high * 1.02


def test_vllm_answers_a_2048_token_prompt_in_49_ms() -> None:
    speed = on_h100("Qwen-7B", stack="vllm", prompt=2048, generate=1).speed
    assert speed.time_to_first_token == pytest.approx(0.0491, rel=0.10)


@pytest.mark.parametrize(("seq_len", "measured"), [(256, 18.6), (1024, 20.2), (4096, 26.7), (8192, 35.3)])
def test_transformers_5_finetunes_in_as_much_memory_as_planned(seq_len: int, measured: float) -> None:
    memory = on_h100("Qwen-7B", "lora", stack="transformers-5", seq_len=seq_len).memory
    assert memory.allocated / 1e9 == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("seq_len", "measured"), [(1024, 18.7), (4096, 20.7), (8192, 23.3)])
def test_a_fused_loss_takes_what_liger_was_measured_to_take(seq_len: int, measured: float) -> None:
    memory = on_h100("Qwen-7B", "lora", stack="transformers-5", seq_len=seq_len, fused_loss=True).memory
    assert memory.allocated / 1e9 == pytest.approx(measured, rel=0.06)


def test_transformers_5_generates_in_as_much_memory_as_planned() -> None:
    memory = on_h100("Qwen-7B", stack="transformers-5", prompt=1, generate=2048).memory
    assert memory.allocated / 1e9 == pytest.approx(16.57, rel=0.03)
    assert memory.reserved / 1e9 == pytest.approx(17.66, rel=0.03)
    assert memory.process / 1e9 == pytest.approx(18.59, rel=0.03)


@pytest.mark.parametrize(
    ("seq_len", "seconds", "gigabytes"), [(256, 0.35, 17.5), (1024, 0.80, 18.0), (4096, 3.2, 19.5), (8192, 6.9, 22.0)]
)
def test_the_plan_holds_our_trainer_to_its_goals(seq_len: int, seconds: float, gigabytes: float) -> None:
    made = on_h100("Qwen-7B", "lora", seq_len=seq_len)
    assert made.speed.seconds_per_iter is not None and made.speed.seconds_per_iter <= seconds
    assert made.memory.allocated / 1e9 <= gigabytes


@pytest.mark.parametrize(
    ("model", "precision", "goal"),
    [
        *(("Qwen-7B", "bf16", 190), ("Qwen-7B", "int8", 295), ("Qwen-7B", "int4", 420)),
        *(("Qwen-1.8B", "bf16", 665), ("Qwen-72B", "int4", 60)),
    ],
)
def test_the_plan_holds_our_engine_to_its_goals(model: str, precision: str, goal: float) -> None:
    assert on_h100(model, precision=precision).speed.tokens_per_s >= 0.98 * goal


def test_our_engine_takes_the_weights_one_cache_and_at_most_3_percent() -> None:
    memory = on_h100("Qwen-7B", prompt=1, generate=2047).memory
    assert memory.allocated <= 1.03 * (15_442_649_088 + 2048 * 524_288)
