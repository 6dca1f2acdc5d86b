"""`qwenfit plan` as a person types it: every option, every output form, every exit code, and never a traceback."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest

from qwenfit.cli import app, main

QWEN_1 = {
    "architectures": ["QWenLMHeadModel"],
    "model_type": "qwen",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "kv_channels": 128,
    "intermediate_size": 22016,
    "vocab_size": 151936,
    "seq_length": 8192,
    "max_position_embeddings": 32768,
    "layer_norm_epsilon": 1e-6,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "tie_word_embeddings": False,
    "bf16": True,
}


class Result:
    """What a run printed and returned."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err
        assert "Traceback" not in out + err, err

    def json(self) -> Any:
        assert self.code in (0, 3), self.err
        return json.loads(self.out)

    def refused(self, code: int, *words: str) -> None:
        """One sentence with the cause, then a hint; nothing on standard output."""
        lines = self.err.splitlines()
        assert self.code == code, (self.code, self.err)
        assert self.out == ""
        assert lines[0].startswith("error: ") and lines[0].endswith((".", "?", ")", "'", '"')), self.err
        assert len(lines) <= 2 and all(line.startswith("  try: ") for line in lines[1:]), self.err
        for word in words:
            assert word in self.err, self.err


Cli = Callable[..., Result]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """`qwenfit plan ...` in this process."""

    def call(*arguments: str) -> Result:
        capsys.readouterr()
        try:
            main(["plan", *arguments])
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        assert isinstance(code, int)
        return Result(code, printed.out, printed.err)

    return call


def spawn(*arguments: str, **environment: str) -> Result:
    """`qwenfit plan ...` in a process of its own."""
    command = [sys.executable, "-m", "qwenfit", "plan", *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=os.environ | environment, encoding="utf-8"
    )
    return Result(done.returncode, done.stdout, done.stderr)


H100, RTX = ("--gpu", "H100-SXM5-80GB"), ("--gpu", "RTX 3090")


def test_a_process_prints_the_table_bar_verdict_command_and_source() -> None:
    done = spawn("Qwen-7B", *RTX)
    assert done.code == 0 and done.err == ""
    for words in ("fits: 17.03 GB (15.86 GiB)", "weights", "15.44 GB", "14.38 GiB", "tokens/s generated", "bound by"):
        assert words in done.out
    assert "run     qwenfit chat Qwen-7B --precision bf16 --context 2049" in done.out
    assert "source  NVIDIA Ampere" in done.out
    assert "\x1b" not in done.out  # no colour into a pipe


def test_the_three_plans_that_the_project_shows() -> None:
    assert spawn("Qwen-72B", "--task", "qlora", "--gpu", "A100-SXM4-80GB").code == 0
    too_large = spawn("Qwen-14B", "--gpu", "RTX 4090", "--context", "8192")
    assert too_large.code == 3
    assert (
        "does not fit" in too_large.out and "short by" in too_large.out and "advice  use int8 weights" in too_large.out
    )


def test_without_a_model_the_table_of_everything_that_fits() -> None:
    done = spawn(*RTX)
    assert done.code == 0
    assert "Qwen-14B" in done.out and "Qwen-72B" not in done.out
    assert "The largest that fits" in done.out


PLAN_FIELDS = {
    *("schema", "model", "parameters", "hardware", "task", "precision", "stack", "parallel", "memory", "notes"),
    *("memory_per_device", "headroom", "speed", "verdict", "command", "advice"),
}
MEMORY_FIELDS = {
    *("weights", "kv_cache", "logits", "activations", "gradients", "optimizer", "adapters", "workspace", "reserve"),
    *("context", "allocated", "reserved", "process"),
}


@pytest.mark.parametrize("form", [("--json",), ("-o", "json")])
def test_json_has_every_field_as_plain_numbers_and_strings(form: tuple[str, ...]) -> None:
    made = spawn("Qwen-72B", "--gpu", "A100-SXM4-80GB", "--gpus", "2", *form).json()
    assert set(made) == PLAN_FIELDS
    assert set(made["memory"]) == MEMORY_FIELDS and len(made["memory_per_device"]) == 2
    assert all(isinstance(value, int) for value in made["memory"].values())
    assert made["hardware"]["source"] and made["hardware"]["gpus"] == 2
    assert made["task"] == {
        **{"name": "inference", "prompt": 1, "generate": 2048, "batch": 1, "shared_prefix": 0, "kv_cache": "bf16"},
        "head_precision": None,
        "flash_attention": None,
    }
    assert made["speed"]["bound"] == "memory bandwidth"
    assert made["speed"]["interval"]["low"] < made["speed"]["tokens_per_s"] < made["speed"]["interval"]["high"]
    assert made["verdict"] in ("fits", "tight") and made["headroom"] > 0


def test_markdown_and_csv_are_tables_of_one_plan(cli: Cli) -> None:
    header, rule, row = cli("Qwen-7B", *RTX, "-o", "md").out.splitlines()
    assert header.startswith("| model") and set(rule) == set("|- ") and row.startswith("| Qwen-7B")
    rows = list(csv.DictReader(io.StringIO(cli("Qwen-7B", *RTX, "-o", "csv").out)))
    assert len(rows) == 1 and rows[0]["model"] == "Qwen-7B" and float(rows[0]["memory GB"]) == 17.03


OPTIONS: list[tuple[tuple[str, ...], Callable[[dict[str, Any]], object], object]] = [
    (("--gpus", "2"), lambda p: p["parallel"], "layers"),
    (("--gpus", "2", "--stack", "vllm"), lambda p: p["parallel"], "tensor"),
    (("--gpus", "2", "--parallel", "tensor"), lambda p: p["parallel"], "tensor"),
    (("--gpus", "2", "--nodes", "2"), lambda p: len(p["memory_per_device"]), 4),
    (("--nodes", "2", "--network-gbps", "100"), lambda p: p["hardware"]["network_bandwidth"], 12.5e9),
    (("--precision", "int4"), lambda p: p["precision"], "int4"),
    (("--stack", "transformers-4.3x"), lambda p: p["speed"]["bound"], "host"),
    (("-c", "4096"), lambda p: (p["task"]["prompt"], p["task"]["generate"]), (2048, 2048)),
    (("--context", "4096", "--prompt", "4000"), lambda p: p["task"]["generate"], 96),
    (("--context", "4096", "--generate", "96"), lambda p: p["task"]["prompt"], 4000),
    (("--context", "100"), lambda p: (p["task"]["prompt"], p["task"]["generate"]), (1, 99)),
    (("--prompt", "7", "--generate", "9"), lambda p: (p["task"]["prompt"], p["task"]["generate"]), (7, 9)),
    (("--batch", "4"), lambda p: p["task"]["batch"], 4),
    (("--users", "4"), lambda p: p["task"]["batch"], 4),
    (("--prompt", "64", "--shared-prefix", "32"), lambda p: p["task"]["shared_prefix"], 32),
    (("--kv-cache", "int8"), lambda p: "--kv-cache int8" in p["command"], True),
    (("--kv_cache", "int8"), lambda p: p["task"]["kv_cache"], "int8"),
    (("--precision", "int4", "--head-precision", "int4"), lambda p: "--head-precision int4" in p["command"], True),
    (("--no-flash-attention",), lambda p: p["task"]["flash_attention"], False),
    (("--flash_attention",), lambda p: p["task"]["flash_attention"], True),
    (("--host-factor", "2", "--stack", "transformers-5"), lambda p: p["hardware"]["host_factor"], 2.0),
    (("--task", "lora", "--seq-len", "256"), lambda p: p["task"]["seq_len"], 256),
    (("--task", "lora", "--context", "256"), lambda p: p["task"]["seq_len"], 256),
    (
        (
            "--task",
            "lora_emb",
        ),
        lambda p: p["task"]["name"],
        "lora-emb",
    ),
    (("--task", "lora", "--micro-batch", "2"), lambda p: p["task"]["micro_batch"], 2),
    (("--task", "lora", "--grad-accum", "16"), lambda p: p["task"]["grad_accum"], 16),
    (("--task", "lora", "--lora-rank", "8"), lambda p: "--lora-rank 8" in p["command"], True),
    (("--task", "lora", "--optimizer", "8bit"), lambda p: "--optimizer 8bit" in p["command"], True),
    (("--task", "lora", "--no-checkpointing"), lambda p: p["task"]["checkpointing"], False),
    (("--task", "lora", "--full-logits", "--seq-len", "8192"), lambda p: p["memory"]["logits"] > 10e9, True),
    (("--task", "lora", "--fused-loss", "--stack", "transformers-5"), lambda p: p["memory"]["logits"] < 1e9, True),
    (("--task", "full", "--gpus", "4", "--zero", "2"), lambda p: p["parallel"], "zero2"),
    (("--task", "full", "--gpus", "4"), lambda p: p["parallel"], "zero3"),
    (
        (
            "--task",
            "qlora",
        ),
        lambda p: p["precision"],
        "int4",
    ),
    (("--task", "qlora", "--precision", "int8"), lambda p: p["precision"], "int8"),
]


@pytest.mark.parametrize(
    ("arguments", "field", "expected"), OPTIONS, ids=[" ".join(arguments) for arguments, *_ in OPTIONS]
)
def test_every_option_is_heard(
    cli: Cli, arguments: tuple[str, ...], field: Callable[[dict[str, Any]], object], expected: object
) -> None:
    made = cli("Qwen-7B", *H100, "--json", *arguments).json()
    assert field(made) == expected


@pytest.mark.parametrize(
    ("find", "arguments", "expected"),
    [
        ("context", ("Qwen-7B", *RTX), 18_000),
        ("batch", ("Qwen-7B", *RTX), 8),
        ("batch", ("Qwen-7B", *H100, "--task", "lora"), 120),
        ("seq-len", ("Qwen-7B", *RTX, "--task", "lora"), 19_000),
        ("seq_len", ("Qwen-7B", *RTX, "--task", "lora"), 19_000),
        ("precision", ("Qwen-14B", *RTX), "int8"),
    ],
)
def test_reverse_questions_answer_with_a_figure_and_its_plan(
    cli: Cli, find: str, arguments: tuple[str, ...], expected: object
) -> None:
    answer = cli(*arguments, "--find", find, "--json").json()
    assert answer["find"] == find.replace("_", "-") and answer["plan"]["verdict"] in ("fits", "tight")
    if isinstance(expected, str):
        assert answer["answer"] == expected
    else:
        assert isinstance(answer["answer"], int) and answer["answer"] == pytest.approx(expected, rel=0.25)
    text = cli(*arguments, "--find", find)
    assert text.code == 0 and text.out.startswith(f"{find.replace('_', '-')}: ")


def test_find_gpu_ranks_cards_and_an_impossible_question_has_no_answer_in_every_form(cli: Cli) -> None:
    found = cli("Qwen-14B", *RTX, "--find", "gpu", "--json").json()
    assert len(found["answer"]) == len(found["plans"]) > 20
    assert "Arc A770" in cli("Qwen-7B", *RTX, "--find", "gpu").out.splitlines()[1]
    for find in ("context", "batch", "precision"):
        nothing = cli("Qwen-72B", *RTX, "--find", find, "--json")
        assert nothing.code == 3 and nothing.json()["answer"] is None
        assert [line[:7] for line in cli("Qwen-72B", *RTX, "--find", find).out.splitlines()] == ["Qwen-72", "  try: "]


def test_all_of_json_without_a_model_and_exit_3_when_nothing_fits(cli: Cli) -> None:
    assert len(cli(*H100, "--json").json()) == 84
    assert {p["precision"] for p in cli(*H100, "--json", "--precision", "int8").json()} == {"int8"}
    many = ("--gpu", "GTX 1660", "--batch", "1000000")
    assert cli(*many).code == 3 and cli(*many, "--json").code == 3
    assert cli(*H100, "--task", "full", "--gpus", "8", "-o", "md").out.startswith("| model")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("Qwen-7C", *RTX), 4, ("Qwen-7C", "Qwen-7B")),
        (("Qwen-7B", "--gpu", "RTX 3091"), 4, ("RTX 3091", "RTX 3090")),
        (("Qwen-7B", "--gpu", "A100"), 2, ("different memory", "A100-SXM4-80GB")),
        (("Qwen3-30B-A3B", *RTX), 2, ("Qwen3-30B-A3B", "mixture of experts")),
        (("Qwen-7B", *RTX, "--batch", "-1"), 2, ("at least 1",)),
        (("Qwen-7B", *RTX, "--batch", "0"), 2, ("at least 1",)),
        (("Qwen-7B", *RTX, "--generate", "99999999999999"), 2, ("beyond",)),
        (("Qwen-7B", *RTX, "--context", "1"), 2, ("at least 2",)),
        (("Qwen-7B", *RTX, "--context", "40000"), 2, ("32768", "40000")),
        (("Qwen-14B", *RTX, "--context", "8194"), 2, ("8192",)),
        (("Qwen-7B", *RTX, "--context", "4000", "--generate", "5000"), 2, ("contradicts",)),
        (("Qwen-7B", *RTX, "--gpus", "0"), 2, ("at least 1",)),
        ((*RTX, "--gpus", "0"), 2, ("at least 1",)),
        (("Qwen-7B", *RTX, "--gpus", "5000"), 2, ("4096",)),
        (("Qwen-7B", *RTX, "--network-gbps", "nan"), 2, ("network_gbps",)),
        (("Qwen-7B", *RTX, "--host-factor", "-1"), 2, ("host_factor",)),
        ((*RTX, "--host-factor", "-1"), 2, ("host_factor",)),
        (("Qwen-7B", *RTX, "--stack", "vlm"), 2, ("vlm", "vllm")),
        ((*RTX, "--stack", "vlm"), 2, ("vlm", "vllm")),
        (("Qwen-7B", *RTX, "--task", "dpo"), 2, ("qlora",)),
        (("Qwen-7B", *RTX, "--precision", "fp8"), 2, ("bf16", "fp8")),
        ((*RTX, "--precision", "fp8"), 2, ("bf16", "fp8")),
        (("Qwen-7B", *RTX, "--kv-cache", "int4"), 2, ("int8", "int4")),
        (("Qwen-7B", *RTX, "--head-precision", "fp8"), 2, ("int8", "fp8")),
        (("Qwen-7B", *RTX, "--head-precision", "int8", "--stack", "vllm"), 2, ("16 bits",)),
        (("Qwen-7B", *RTX, "--seq-len", "256"), 2, ("no seq_len",)),
        (("Qwen-7B", *RTX, "--task", "lora", "--batch", "4"), 2, ("no batch",)),
        (("Qwen-7B", *RTX, "--task", "lora", "--zero", "1"), 2, ("0, 2 or 3",)),
        (("Qwen-7B", *RTX, "--find", "seq-len"), 2, ("finetuning",)),
        (("--find", "gpu"), 2, ("one model",)),
        (("Qwen-7B", *RTX, "--find", "price"), 2, ("price",)),
        (("Qwen-7B", *RTX, "--batch", "many"), 2, ("many",)),
        (("Qwen-7B", *RTX, "--no-such-option"), 2, ("no-such-option",)),
        (("Qwen-7B", *RTX, "--measure-bandwidth"), 2, ("CPU",)),
        (("x" * 5000, *RTX), 4, ()),
        (("Qwen-7B\x1b[31m", *RTX), 4, ()),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, tuple) else str(value),
)
def test_a_mistake_is_one_sentence_and_a_hint(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cli(*arguments).refused(code, *words)


def write(path: Path, value: Any) -> str:
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return str(path)


def test_a_config_json_and_its_folder_are_planned_as_the_catalog_model(cli: Cli, tmp_path: Path) -> None:
    file = write(tmp_path / "config.json", QWEN_1)
    wanted = cli("Qwen-7B", *RTX, "--json").json()["memory"]
    assert cli(file, *RTX, "--json").json()["memory"] == wanted
    assert cli(str(tmp_path), *RTX, "--json").json()["memory"] == wanted


def test_a_path_with_a_space_is_quoted_in_the_command(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    write(folder / "config.json", QWEN_1)
    assert f"'{folder}'" in cli(str(folder), *RTX, "--json").json()["command"]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("{", 5),
        ("", 5),
        ("[]", 5),
        ("\x00\x01", 5),
        (QWEN_1 | {"hidden_size": -4096}, 5),
        (QWEN_1 | {"hidden_size": "4096"}, 5),
        (QWEN_1 | {"num_hidden_layers": 10**30}, 5),
        (QWEN_1 | {"num_attention_heads": 31}, 5),
        (QWEN_1 | {"vocab_size": 1e400}, 5),
        ("[" * 100_000, 5),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_config_json_that_lies_is_a_bad_file(cli: Cli, tmp_path: Path, content: Any, code: int) -> None:
    cli(write(tmp_path / "config.json", content), *RTX).refused(code)


def test_mixtures_of_experts_and_other_architectures_are_refused_by_name(cli: Cli, tmp_path: Path) -> None:
    moe = {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128}
    result = cli(write(tmp_path / "config.json", moe), *RTX)
    assert result.code in (2, 5)
    result.refused(result.code, "experts")
    llama = cli(write(tmp_path / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}), *RTX)
    llama.refused(llama.code, "lama")


def test_huge_missing_and_odd_files_cost_no_memory(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    huge = tmp_path / "config.json"
    with open(huge, "wb") as file:
        file.truncate(2**30)
    cli(str(huge), *RTX).refused(5)
    (tmp_path / "sub" / "config.json").mkdir(parents=True)
    for odd in (tmp_path / "sub", tmp_path / "sub" / "config.json"):
        result = cli(str(odd), *RTX)
        result.refused(result.code)
        assert result.code in (4, 5)
    missing = cli(str(tmp_path / "nothing" / "config.json"), *RTX)
    missing.refused(missing.code)
    assert missing.code == 4


def test_a_gguf_that_lies_about_its_counts_is_a_bad_file(cli: Cli, tmp_path: Path) -> None:
    for tensors, pairs in ((2**60, 1), (1, 2**60), (0, 0)):
        lying = tmp_path / "lying.gguf"
        lying.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs))
        cli(str(lying), *RTX).refused(5)


def test_a_hub_id_offline_says_so() -> None:
    done = spawn("someone/some-qwen-model", *RTX, HF_HUB_OFFLINE="1", HF_HOME="/nonexistent")
    done.refused(4, "someone/some-qwen-model")


def test_environment_variables_are_options() -> None:
    made = spawn("Qwen-7B", "--json", QWENFIT_PLAN_GPU="RTX 3090", QWENFIT_PLAN_BATCH="2").json()
    assert made["hardware"]["device"] == "RTX 3090" and made["task"]["batch"] == 2
    spawn("Qwen-7B", QWENFIT_PLAN_GPU="RTX 3090", QWENFIT_PLAN_BATCH="none").refused(2, "none")


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("environment", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colour_is_for_terminals_and_no_color_turns_it_off(environment: dict[str, str], coloured: bool) -> None:
    master, terminal = os.openpty()
    command = [sys.executable, "-m", "qwenfit", "plan", "Qwen-7B", *RTX]
    clean = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    with subprocess.Popen(command, stdout=terminal, stderr=subprocess.STDOUT, env=clean | environment) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # Linux: the other end is closed
                break
            if not chunk:
                break
            shown += chunk
    os.close(master)
    assert process.returncode == 0 and b"fits" in shown
    assert (b"\x1b[" in shown) == coloured


def test_a_closed_pipe_ends_quietly() -> None:
    command = f"{sys.executable} -m qwenfit plan --gpu H100 | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.stdout.count("\n") == 1 and done.returncode == 0


def test_help_version_and_a_wrong_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, word in (
        (["--help"], 0, "plan"),
        (["plan", "-h"], 0, "--find"),
        (["--version"], 0, "version"),
        (["plam"], 2, "plam"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        printed = capsys.readouterr()
        assert end.value.code == code
        assert word in (printed.err if code else printed.out)


def test_this_machine_is_planned_when_no_card_is_named(cli: Cli) -> None:
    made = cli("Qwen2.5-0.5B", "--gpu", "cpu", "--json").json()
    assert made["hardware"]["usable_bytes"] <= made["hardware"]["memory_bytes"]
    assert cli("Qwen2.5-0.5B").code in (0, 3)


def test_every_verb_takes_json() -> None:
    verbs = app.list_commands(click.Context(app))
    commands = [app.get_command(click.Context(app), verb) for verb in verbs]
    assert len(commands) > 10
    for command in commands:
        assert command is not None and "--json" in [name for option in command.params for name in option.opts]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("arguments", [("plan", "Qwen-7B", *RTX), ("guide", "--table", "models")], ids=" ".join)
def test_a_full_disk_is_one_sentence(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "qwenfit", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "error: The disk is full: the output could not be written."
    assert "Traceback" not in done.stderr and "ignored" not in done.stderr


def test_a_closed_output_is_no_bug() -> None:
    command = f"{sys.executable} -m qwenfit plan Qwen-7B --gpu H100 >&-"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_refusal_says_what_to_do_next(cli: Cli, tmp_path: Path) -> None:
    for arguments, word in (
        (("Qwen-7B", *RTX, "--batch", "-1"), "qwenfit plan --help"),
        (("Qwen-7B", *RTX, "--gpus", "3", "--parallel", "tensor"), "--parallel layers"),
        (("Qwen2.5-Coder-7B", *RTX), "Hub id"),
        (("Qwen-7B", *RTX, "--task", "lora", "--micro-batch", "1000000"), "error: micro_batch x seq_len = 1024000000"),
        ((write(tmp_path / "config.json", QWEN_1 | {"hidden_size": 10**30}), *RTX), "Download the file again"),
    ):
        result = cli(*map(str, arguments))
        assert result.code in (2, 4, 5)
        assert "\n  try: " in result.err and word in result.err
    assert "hidden_size of many digits" in result.err
    asked = cli("Qwen-72B", *RTX, "--find", "context")
    assert asked.code == 3 and "--find precision, or --find gpu" in asked.out


def test_the_ranking_of_cards_shows_what_it_ranks_by(cli: Cli) -> None:
    rows = list(csv.DictReader(io.StringIO(cli("Qwen-7B", *RTX, "--find", "gpu", "-o", "csv").out)))
    prices = [float(row["list price $"]) for row in rows if row["list price $"] != "-"]
    assert len(prices) > 5 and prices == sorted(prices)
    assert {row["hardware"]: row["list price $"] for row in rows}["2 x RTX 3060 12GB (layers)"] == "658"


def test_every_speed_has_an_interval_and_what_binds_it(cli: Cli) -> None:
    """A long prompt is bound by arithmetic, its answers by memory; each request's part is told too."""
    text = " ".join(cli("Qwen-7B", "--gpu", "H100", "--prompt", "2048", "--batch", "8").out.split())
    number = r"[\d,.]+"
    for pattern in (
        rf"{number} tokens/s generated \({number} to {number}\), bound by memory bandwidth",
        rf"{number} tokens/s \({number} to {number}\) for each of 8 requests",
        rf"{number} ms \({number} ms to {number} ms\) to the first token of a 2,048-token prompt, bound by compute",
    ):
        assert re.search(pattern, text), pattern
    speed = cli("Qwen-7B", "--gpu", "H100", "--prompt", "2048", "--json").json()["speed"]
    assert speed["time_to_first_token_interval"]["low"] < speed["time_to_first_token"]
    assert speed["time_to_first_token_bound"] == "compute"
