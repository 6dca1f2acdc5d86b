"""Reverse questions and advice: every figure they give is that of a plan anyone can ask for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qwenfit.hardware import Hardware, find_device
from qwenfit.planning.planner import plan
from qwenfit.planning.search import (
    best_fit,
    best_precision,
    biggest_batch,
    cards_that_fit,
    longest_sample,
    most_context,
    replan,
    what_fits,
)
from qwenfit.planning.task import Finetune, Inference
from qwenfit.planning.types import Plan

QUESTIONS = [
    ("Qwen-7B", "RTX 3090", "qwenfit", {}),
    ("Qwen-7B", "A100-SXM4-40GB", "transformers-4.3x", {"batch": 4}),
    ("Qwen-14B", "RTX 4090", "qwenfit", {"precision": "int4"}),
    ("Qwen2.5-32B", "A100-SXM4-80GB", "vllm", {"kv_cache": "int8", "prompt": 512, "generate": 100}),
    ("Qwen3-8B", "T4", "transformers-5", {"precision": "int8"}),
    ("Qwen-7B", "EPYC 9004 32GB", "qwenfit", {}),
]


@pytest.mark.parametrize(("model", "card", "stack", "options"), QUESTIONS)
def test_the_most_context_fits_and_one_token_more_does_not(
    model: str, card: str, stack: str, options: dict[str, object]
) -> None:
    made = plan(model, gpu=card, stack=stack, advise=False, **options)  # type: ignore[arg-type]
    most = most_context(made)
    assert most > 1
    for tokens, fits in ((most, True), (most + 1, False)):
        if tokens > made.model.context_length:
            continue
        answer = min(made.task.generate, tokens - 1)  # type: ignore[union-attr]
        there = replan(made, task=replace(made.task, prompt=tokens - answer, generate=answer))
        assert there.fits == fits


@pytest.mark.parametrize(("model", "card", "stack", "options"), QUESTIONS)
def test_the_biggest_batch_fits_and_one_request_more_does_not(
    model: str, card: str, stack: str, options: dict[str, object]
) -> None:
    made = plan(model, gpu=card, stack=stack, advise=False, **options)  # type: ignore[arg-type]
    most = biggest_batch(made)
    assert most >= 1
    assert replan(made, task=replace(made.task, batch=most)).fits
    assert not replan(made, task=replace(made.task, batch=most + 1)).fits


@pytest.mark.parametrize(("method", "card"), [("lora", "RTX 3090"), ("qlora", "RTX 3060 12GB"), ("lora-emb", "L40S")])
@pytest.mark.parametrize("stack", ["qwenfit", "transformers-4.3x", "transformers-5"])
def test_the_longest_sample_and_biggest_micro_batch_fit_and_more_do_not(method: str, card: str, stack: str) -> None:
    made = plan("Qwen-7B", method, gpu=card, stack=stack, seq_len=256, advise=False)
    length, size = longest_sample(made), biggest_batch(made)
    if not length:
        assert not made.fits and not size
        return
    assert replan(made, task=replace(made.task, seq_len=length)).fits
    if length < made.model.context_length:
        assert not replan(made, task=replace(made.task, seq_len=length + 1)).fits
    if size:
        assert replan(made, task=replace(made.task, micro_batch=size)).fits
    assert not replan(made, task=replace(made.task, micro_batch=size + 1)).fits


def test_no_answer_is_zero_not_a_guess() -> None:
    made = plan("Qwen-72B", gpu="RTX 3090", advise=False)
    assert most_context(made) == biggest_batch(made) == 0
    assert best_precision(made) is None


def test_the_cheapest_card_comes_first_and_each_is_the_fewest_that_fit() -> None:
    made = plan("Qwen-14B", gpu="A100-SXM4-80GB", advise=False)
    plans = cards_that_fit(made)
    prices = [p.hardware.gpus * p.hardware.device.price_usd for p in plans if p.hardware.device.price_usd is not None]
    assert prices == sorted(prices) and prices
    for candidate in plans:
        assert candidate.fits
        fewer = candidate.hardware.gpus // 2
        if fewer:
            assert not replan(made, hardware=replace(candidate.hardware, gpus=fewer)).fits
        if candidate.hardware.device.kind == "unified":
            assert candidate.hardware.gpus == 1
        expected = "bf16" if candidate.hardware.device.bf16 else "fp16"
        assert candidate.precision == expected


def test_the_finest_precision_is_chosen_and_q_lora_is_never_16_bit() -> None:
    def finest(card: str, task: str = "inference") -> str | None:
        best = best_precision(plan("Qwen-7B", task, gpu=card, advise=False))
        return best.precision if best else None

    assert [finest(c) for c in ("A100-SXM4-80GB", "V100-SXM2-32GB", "RTX 3060 12GB", "RTX 3070")] == [
        *("bf16", "fp16", "int8", "int4"),
    ]
    assert finest("A100-SXM4-80GB", "qlora") == "int8"
    assert finest("RTX 3070", "qlora") == "int4"
    assert finest("GTX 1660", "qlora") is None
    assert finest("RTX 3080", "qlora") == "int4"
    assert finest("RTX 3060 12GB", "lora") is None


def test_models_not_made_for_the_context_are_left_out_of_what_fits() -> None:
    hardware = Hardware(find_device("H100-SXM5-80GB"))
    long = what_fits(hardware, Inference(prompt=32_000, generate=2_000))
    assert {p.model.name.split("-")[0] for p in long} == {"Qwen3"}
    assert all(p.task == Inference(prompt=32_000, generate=2_000) for p in long)
    best = best_fit(long)
    assert best is not None and best.fits and best.model.name == "Qwen3-32B"


def test_every_dense_model_and_precision_is_in_what_fits() -> None:
    plans = what_fits(Hardware(find_device("RTX 3090")), Inference())
    assert len(plans) == 28 * 3
    assert len(what_fits(Hardware(find_device("RTX 3090")), Finetune("qlora"))) == 28 * 2
    assert len(what_fits(Hardware(find_device("RTX 3090")), Inference(), precision="int4")) == 28


CASES: list[dict[str, object]] = [
    {"model": "Qwen-7B", "gpu": "RTX 3090", "stack": "qwenfit"},
    {"model": "Qwen-14B", "gpu": "RTX 4090", "prompt": 6144, "generate": 2048},
    {"model": "Qwen-72B", "gpu": "RTX 3090"},
    {"model": "Qwen-7B", "gpu": "A100-SXM4-80GB", "stack": "transformers-4.3x", "batch": 64, "generate": 1024},
    {"model": "Qwen-7B", "gpu": "A100-SXM4-80GB", "stack": "transformers-4.3x", "flash_attention": False},
    {"model": "Qwen-7B", "gpu": "V100-SXM2-16GB"},
    {"model": "Qwen-7B", "gpu": "T4", "task": "full"},
    {"model": "Qwen-7B", "gpu": "RTX 4090", "task": "lora-emb", "stack": "transformers-5", "micro_batch": 8},
    {"model": "Qwen-14B", "gpu": "RTX 3090", "task": "lora", "checkpointing": False, "seq_len": 4096},
    {"model": "Qwen-72B", "gpu": "A100-SXM4-80GB", "gpus": 4, "task": "lora", "stack": "transformers-4.3x"},
    {"model": "Qwen-72B", "gpu": "A100-SXM4-80GB", "task": "qlora"},
    {"model": "Qwen-7B", "gpu": "H100-SXM5-80GB", "task": "qlora", "stack": "transformers-4.3x"},
    {"model": "Qwen-72B", "gpu": "A100-SXM4-80GB", "gpus": 2, "stack": "transformers-4.3x"},
    {"model": "Qwen-7B", "gpu": "H100-SXM5-80GB", "gpus": 8, "nodes": 2, "task": "full"},
    {"model": "Qwen-72B", "gpu": "H100-SXM5-80GB", "gpus": 8, "nodes": 8, "task": "full", "network_gbps": 50.0},
    {"model": "Qwen-7B", "gpu": "EPYC 9004 16GB", "task": "lora"},
    {"model": "Qwen-7B", "gpu": "Apple M2 Max 32GB", "batch": 32},
    {"model": "Qwen2.5-32B", "gpu": "RTX 4090", "stack": "vllm", "batch": 8, "prompt": 512},
    {"model": "Qwen-7B", "gpu": "A100-SXM4-80GB", "stack": "transformers-5", "host_factor": 3.0},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(v) for v in case.values()))
def test_each_advice_gives_what_it_claims_when_planned(case: dict[str, object]) -> None:
    made = plan(**case)  # type: ignore[arg-type]
    assert made.advice or made.fits
    for advice in made.advice:
        assert advice.what and advice.why
        if advice.process_bytes is None:
            assert advice.changes == {}
            continue
        assert advice.changes, advice.what
        other: Plan = plan(**case | advice.changes, advise=False)  # type: ignore[arg-type]
        assert other.memory.process == advice.process_bytes, advice.what
        assert other.speed.tokens_per_s == pytest.approx(advice.tokens_per_s), advice.what
        assert other.fits, advice.what


def said(**case: object) -> str:
    return " | ".join(f"{a.what}: {a.why}" for a in plan(**case).advice)  # type: ignore[arg-type]


def test_the_guides_recommendations_are_given_where_they_apply() -> None:
    tight = said(model="Qwen-14B", gpu="RTX 4090", prompt=4096, generate=2048)
    for words in ("use int8 weights", "use int4 weights", "use 2 x RTX 4090", "use one V100-SXM2-32GB: the smallest"):
        assert words in tight
    assert "use one Arc A770: the cheapest single card" in said(model="Qwen-7B", gpu="RTX 3080")
    assert "quantize the KV cache to int8" in said(model="Qwen-7B", gpu="A100-SXM4-80GB", batch=16)
    old = {"stack": "transformers-4.3x", "gpu": "A100-SXM4-80GB"}
    assert "install FlashAttention 2" in said(model="Qwen-7B", **old)
    assert "install FlashAttention 2" not in said(
        model="Qwen-7B", stack="transformers-4.3x", gpu="T4", precision="int4"
    )
    assert "use the vllm stack" in said(model="Qwen-72B", gpus=2, **old)
    assert "use the vllm stack" in said(model="Qwen-7B", batch=8, **old)
    assert "vllm" not in said(model="Qwen2.5-7B", gpu="H200", batch=256)  # our engine does the same
    assert "use ZeRO-3" in said(model="Qwen-72B", task="lora", gpus=4, **old)
    between = {"gpus": 8, "nodes": 2, "gpu": "A100-SXM4-80GB"}
    assert "use ZeRO-2 between nodes" in said(model="Qwen-7B", task="lora", zero=3, **between)
    assert "keep ZeRO-3, with a fast network" in said(model="Qwen-72B", task="full", **between | {"nodes": 4})
    assert "gradient checkpointing on" in said(
        model="Qwen-7B", task="lora", gpu="RTX 3090", checkpointing=False, seq_len=4096
    )
    assert "train with Q-LoRA" in said(model="Qwen-7B", task="lora", gpu="RTX 3060 12GB")
    assert "test the network between the nodes first" in said(model="Qwen-7B", task="lora", **between)
    assert "install FlashAttention 2" in said(model="Qwen-7B", task="lora", **old)
    assert "share the prefix" in said(model="Qwen-7B", gpu="A100-SXM4-80GB", batch=8, prompt=1024)


def test_a_precision_is_advised_by_what_is_short_memory_speed_or_quality() -> None:
    """The guide: int4 where memory is short or speed counts, int8 as a balance, bf16 where there is room."""
    assert "use int4 weights for speed" in said(model="Qwen-7B", gpu="H100-SXM5-80GB")
    assert "use bf16 weights for quality" in said(model="Qwen-7B", gpu="H100-SXM5-80GB", precision="int4")
    assert "use fp16 weights for quality" in said(model="Qwen-7B", gpu="V100-SXM2-32GB", precision="int8")
    assert "use int8 weights for quality" in said(model="Qwen-14B", gpu="RTX 3090", precision="int4")
    assert "use int8 weights: a balance" in said(model="Qwen-7B", gpu="Arc A770")  # tight in bf16
    assert "for quality" not in said(model="Qwen-7B-Chat-Int4", gpu="H100-SXM5-80GB")  # its weights are what they are


def test_an_int8_cache_is_advised_for_long_contexts_batches_and_short_memory() -> None:
    words = "quantize the KV cache to int8"
    assert words in said(model="Qwen-7B", gpu="RTX 3090", context=4096)
    assert words in said(model="Qwen-7B", gpu="A100-SXM4-80GB", batch=16)
    assert words in said(model="Qwen-7B", gpu="Arc A770")
    assert words not in said(model="Qwen-7B", gpu="RTX 3090", context=2048)


def test_the_guides_cards_are_named_only_where_they_hold_the_plan() -> None:
    old = said(model="Qwen-7B", gpu="T4", precision="int8", stack="transformers-4.3x")
    assert "take RTX 3090 24GB, RTX 4090 24GB or A100 40GB: the guide recommends it; RTX 3080, the least" in old
    assert "take at least" not in old
    many = said(model="Qwen-14B", gpu="A100-SXM4-80GB", batch=12)
    assert "take A100 80GB: the guide recommends it; A100 40GB, the least" in many
    assert "RTX 3090 24GB" not in said(model="Qwen-7B", gpu="A100-SXM4-80GB", batch=64)


def test_the_guides_minimum_and_recommended_cards_are_named_for_its_four_models() -> None:
    seven = said(model="Qwen-7B", gpu="T4", precision="int8")
    assert "take at least RTX 3080; recommended is RTX 3090 24GB, RTX 4090 24GB or A100 40GB" in seven
    assert "take at least 2x A100 80GB" in said(model="Qwen-72B", gpu="H100-SXM5-80GB", gpus=2)
    assert "take at least" not in said(model="Qwen2.5-7B", gpu="T4") + said(model="Qwen-7B", gpu="T4", task="qlora")


def test_zero_2_is_the_faster_choice_between_nodes_on_a_slow_network() -> None:
    options = {"gpu": "A100-SXM4-80GB", "gpus": 8, "nodes": 2, "network_gbps": 10.0, "advise": False}
    two, three = (plan("Qwen-7B", "lora", zero=z, **options) for z in (2, 3))  # type: ignore[arg-type]
    assert two.speed.tokens_per_s > 3 * three.speed.tokens_per_s
    assert three.memory.process < two.memory.process


def test_the_host_factor_holds_in_advice_and_answers() -> None:
    options = {"gpu": "A100-SXM4-80GB", "stack": "transformers-5"}
    made = plan("Qwen-7B", host_factor=4.0, **options)  # type: ignore[arg-type]
    assert replan(made).speed == made.speed
    assert made.speed.tokens_per_s < plan("Qwen-7B", **options).speed.tokens_per_s / 2  # type: ignore[arg-type]


def test_asked_layers_stay_layers_in_every_answer() -> None:
    made = plan("Qwen-72B", gpu="A100-SXM4-80GB", gpus=4, stack="vllm", parallel="layers", advise=False)
    assert made.parallel == replan(made).parallel == "layers"
    assert made.to_dict()["parallel"] == "layers"
