"""A plan's command is one that the software it is for takes, with the sizes that were planned."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest

from qwenfit.cli import app
from qwenfit.planning.planner import plan

OLD, NEW = "transformers-4.3x", "transformers-5"
WIDE = "512 3 16 ds_config_zero2.json"
CARD = "A100-SXM4-80GB"


def command(model: str = "Qwen-7B", task: str = "inference", **options: object) -> str:
    return plan(model, task, advise=False, **{"gpu": CARD} | options).command  # type: ignore[arg-type]


def parsed(line: str) -> click.Context:
    """The verb's own parameters; fails for an option that it does not have, or that it needs and lacks."""
    words = shlex.split(line)
    assert words[0] == "qwenfit"
    verb = app.get_command(click.Context(app), words[1])
    assert verb is not None
    return verb.make_context(words[1], words[2:])


@pytest.mark.parametrize(
    ("options", "verb", "means"),
    [
        ({"precision": "int4", "context": 4096}, "chat", {"precision": "int4", "context": 4096, "device": None}),
        ({"kv_cache": "int8"}, "chat", {"kv_cache": "int8"}),
        ({"kv_cache": "fp32"}, "chat", {"kv_cache": "fp32"}),
        ({"precision": "fp32"}, "chat", {"precision": "fp32", "kv_cache": "bf16"}),  # chat itself would take fp32
        ({"gpu": "T4"}, "chat", {"precision": "fp16", "kv_cache": None}),
        ({"precision": "int4", "head_precision": "int8"}, "chat", {"head_precision": "int8"}),
        ({"gpu": "EPYC 9004 256GB"}, "chat", {"device": "cpu"}),
        ({"batch": 8}, "generate", {"batch": 8, "context": 2049}),
        ({"task": "lora", "gpu": "Desktop DDR5 64GB"}, "tune", {"method": "lora", "device": "cpu"}),
    ],
    ids=str,
)
def test_a_verb_of_ours_takes_the_command_and_means_what_was_planned(
    options: dict[str, object], verb: str, means: dict[str, object]
) -> None:
    context = parsed(command(**options))  # type: ignore[arg-type]
    assert context.info_name == verb
    assert {key: context.params[key] for key in means} == means


def test_an_inference_over_several_gpus_is_run_by_vllm_and_says_so() -> None:
    made = plan("Qwen2.5-72B-Instruct", gpu=CARD, gpus=2)
    assert made.command.startswith("vllm serve Qwen/Qwen2.5-72B-Instruct ")
    assert "--pipeline-parallel-size 2" in made.command and "--gpu-memory-utilization 0.90" in made.command
    assert any("one device" in note and "--stack vllm" in note for note in made.notes)
    assert not any("one device" in note for note in plan("Qwen-7B", gpu=CARD).notes)


@pytest.mark.parametrize("card", ["MI300X", "Ascend 910B", "Arc A770", "DCU Z100", "Apple M2 Max 96GB"])
def test_a_card_that_our_engine_does_not_run_on_is_said_to_be_one(card: str) -> None:
    assert any("NVIDIA GPUs and on CPUs" in note for note in plan("Qwen-1.8B", gpu=card).notes)
    assert not any("NVIDIA GPUs" in note for note in plan("Qwen-1.8B", gpu=card, stack="vllm").notes)


@pytest.mark.parametrize(
    ("model", "precision", "repository"),
    [
        ("Qwen2.5-7B", None, "Qwen/Qwen2.5-7B"),
        ("Qwen2.5-7B-Instruct", None, "Qwen/Qwen2.5-7B-Instruct"),
        ("qwen2.5-7b", None, "Qwen/Qwen2.5-7B"),
        ("Qwen2.5-7B", "int4", "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4"),
        ("Qwen2.5-7B-Instruct-AWQ", None, "Qwen/Qwen2.5-7B-Instruct-AWQ"),
        ("Qwen1.5-14B", "int8", "Qwen/Qwen1.5-14B-Chat-GPTQ-Int8"),
        ("Qwen3-8B", "int4", "Qwen/Qwen3-8B-AWQ"),
        ("Qwen3-0.6B", "int8", "Qwen/Qwen3-0.6B-GPTQ-Int8"),
        ("Qwen3-8B", "int8", "Qwen/Qwen3-8B"),  # nobody at Qwen published its integers: rounded as it is loaded
    ],
)
def test_the_repository_is_the_one_that_holds_those_weights(model: str, precision: str, repository: str) -> None:
    words = command(model, stack="vllm", precision=precision).split()
    assert words[:3] == ["vllm", "serve", repository]
    assert ("--quantization" in words) is (model == "Qwen3-8B" and precision == "int8")
    assert command(model, stack=NEW, precision=precision).split()[:3] == ["transformers", "serve", repository]


def test_qwen_1_is_converted_first_for_software_that_knows_it_no_more() -> None:
    for stack in ("vllm", NEW):
        assert command("Qwen-1.8B", stack=stack).startswith("qwenfit convert Qwen/Qwen-1_8B ./Qwen-1.8B-bf16-qwen2 && ")
    assert "convert Qwen/Qwen-7B-Chat-Int4 " in command(precision="int4", stack="vllm")
    assert command("Qwen-1.8B", stack=OLD) == "python cli_demo.py -c Qwen/Qwen-1_8B"


def test_vllm_is_told_the_type_that_a_card_has() -> None:
    assert "--dtype float16" in command("Qwen2.5-0.5B", gpu="T4", stack="vllm")
    assert "--dtype" not in command("Qwen2.5-0.5B", stack="vllm")


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        ("lora", {}, "Qwen/Qwen-7B-Chat --bf16 True --use_lora --lora_r 64"),
        ("lora", {"gpus": 4}, "--nproc_per_node 4 ds_config_zero2.json"),
        ("lora-emb", {"lora_rank": 8}, "Qwen/Qwen-7B --use_lora --lora_r 8"),
        ("qlora", {}, "Qwen/Qwen-7B-Chat-Int4 --fp16 True --use_lora --q_lora ds_config_zero2.json"),
        ("full", {"gpus": 8, "nodes": 2}, "--nnodes 2 --node_rank $NODE_RANK Qwen/Qwen-7B ds_config_zero3.json"),
        (
            "full",
            {"gpus": 2, "zero": 2, "seq_len": 512, "micro_batch": 2, "grad_accum": 16},
            "512 2 16 ds_config_zero2.json",
        ),
    ],
    ids=str,
)
def test_the_guides_software_is_started_as_its_scripts_do(task: str, options: dict[str, object], words: str) -> None:
    line = command(task=task, stack=OLD, **options).replace("finetune/", "").split()  # type: ignore[arg-type]
    assert "finetune.py" in line and set(words.split()) <= set(line)
    if task == "lora" and not options:
        assert "--deepspeed" not in line


def test_todays_transformers_train_with_trl() -> None:
    line = command("Qwen2.5-7B", "lora-emb", stack=NEW, gpus=4, zero=3, optimizer="8bit", fused_loss=True)
    assert line.startswith("trl sft --accelerate_config zero3 --num_processes 4 --model_name_or_path Qwen/Qwen2.5-7B ")
    for words in ("--lora_modules_to_save embed_tokens lm_head", "--optim adamw_8bit", "--use_liger_kernel"):
        assert words in line
    assert "--load_in_4bit" in command("Qwen2.5-7B", "qlora", stack=NEW)
    assert "--use_peft" not in command("Qwen2.5-7B", "full", stack=NEW)


def test_a_folder_stays_what_it_is_in_every_command(golden: Path) -> None:
    folder = golden / "qwen2_qwen3" / "qwen2_untied"
    for stack in ("qwenfit", "vllm", OLD, NEW):
        assert str(folder) in shlex.split(command(str(folder), stack=stack, context=64).replace(" && ", " "))
