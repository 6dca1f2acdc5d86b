"""`qwenfit tune` on real files of every format, with every kind of setting, as a user types it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from chat.templates import QWEN25
from fixtures_tokenizer import small_folder
from tune.tiny import hf_model

from qwenfit.tune.progress import read_metrics

__all__ = ["small_folder"]
TESTS = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{TESTS}:{TESTS.parent}", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
SMALL = shlex.split(
    "--precision fp32 --seq-len 64 --max-steps 2 --grad-accum 2 --micro-batch 2 --lora-rank 4 --device cpu"
)

CHATS = [(f"What is {i} and {i}?", f"It is {2 * i}.") for i in range(8)]
GUIDE = [
    {"id": str(i), "conversations": [{"from": "user", "value": q}, {"from": "assistant", "value": a}]}
    for i, (q, a) in enumerate(CHATS)
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
TOOLS = [
    {
        "messages": [
            {"role": "system", "content": "Add."},
            {"role": "user", "content": q},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "1", "content": a},
            {"role": "assistant", "content": a},
        ],
        "tools": [TOOL],
    }
    for q, a in CHATS
]
SHAREGPT = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in CHATS]
ALPACA = [{"instruction": q, "input": "", "output": a} for q, a in CHATS]
WANDB = """
from pathlib import Path
def init(project, config, dir):
    folder, lines = Path(dir), [f"{project} {config['lora_rank']}"]
    class Run:
        def log(self, row, step): lines.append(f"{step} {row.get('loss') is not None}")
        def finish(self): (folder / "wandb.txt").write_text("\\n".join(lines))
    return Run()
"""


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_folder) -> Path:
    """A tiny chat model, and data files."""
    folder = tmp_path_factory.mktemp("commands")
    model = folder / "model"
    hf_model(vocab_size=720).save_pretrained(model)
    for path in small_folder.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    (model / "chat_template.jinja").write_text(QWEN25)
    (model / "generation_config.json").write_text('{"chat_format": "chatml"}')
    (folder / "guide.json").write_text(json.dumps(GUIDE, indent=1))
    (folder / "tools.jsonl").write_text(lines(TOOLS))
    (folder / "sharegpt.jsonl").write_text(lines(SHAREGPT))
    (folder / "alpaca.jsonl").write_text(lines(ALPACA))
    (folder / "again.jsonl").write_text(lines(ALPACA))
    (folder / "bad.jsonl").write_text(lines(ALPACA[:1]) + '{"instruction": "no answer"}\n' + lines(ALPACA[1:]))
    (folder / "long.jsonl").write_text(lines([*ALPACA[:4], {"instruction": "Count.", "output": "1 2 3 4 " * 40}]))
    (folder / "book.txt").write_text("It was the best of times, it was the worst of times.\n" * 30)
    (folder / "packages").mkdir()
    (folder / "packages" / "wandb.py").write_text(WANDB)
    (folder / "run.yaml").write_text(
        f"model: {model}\ndata: [{folder}/sharegpt.jsonl]\noutput: {folder}/yaml\nformat: sharegpt\non-long: drop\n"
        "skip_bad: true\neval_share: 0.25\npad: false\nlr: 1e-2\nkeep: all\nprecision: fp32\nseq-len: 64\n"
        "max-steps: 2\ngrad_accum: 2\nlora_rank: 4\ndevice: cpu\n"
    )
    (folder / "typo.yaml").write_text(f"model: {model}\nlearning_rat: 1e-4\n")
    return folder


RUNS = {
    "guide": "-d guide.json@2 -d alpaca.jsonl --mask qwen1 --eval-share 0.25 --eval-every 1 --patience 5",
    "tools": "-d tools.jsonl --format messages --seq-len 256 --pack --optimizer 8bit --keep attention",
    "sharegpt": "-d sharegpt.jsonl --no-pad --moments fp32 --keep all --schedule constant --new-tokens",
    "skipped": "-d bad.jsonl --skip-bad --eval-data guide.json --method lora-emb",
    "dropped": "-d long.jsonl --on-long drop --method qlora --precision int4",
    "text": "-d book.txt --mask all --method full --optimizer bf16 --precision bf16",
    "wandb": "-d alpaca.jsonl --wandb project",
    "json": "-d alpaca.jsonl --eval-data guide.json --json",
    "bad": "-d bad.jsonl",
    "long": "-d long.jsonl --on-long error",
    "deepspeed": "-d alpaca.jsonl --deepspeed",
    "format": "-d alpaca.jsonl --format sharegpt",
    "nothing to evaluate": "-d alpaca.jsonl --patience 2",
    "no wandb": "-d alpaca.jsonl --wandb project",
    "no tensorboard": "-d alpaca.jsonl --tensorboard",
}
# One after the other in the folder "again": other settings, then other data.
AGAIN = {
    "again": "-d again.jsonl",
    "again resumed": "-d again.jsonl --resume --save-every 7",
    "again with another mask": "-d again.jsonl --resume --mask all",
    "again with other data": "-d again.jsonl --resume",
}
OTHER = {
    "yaml": "--config run.yaml --lr 5e-4",
    "typo": "--config typo.yaml",
    "preview": "model -d guide.json -d book.txt --seq-len 64 --mask qwen1 --preview 2",
    "previewed": "model -d tools.jsonl --seq-len 256 --preview 1",
    "packed preview": "model -d guide.json --seq-len 256 --preview 0 --pack --epochs 5",
    "backward preview": "model -d guide.json --preview -3",
}


@pytest.fixture(scope="module")
def ran(folder) -> dict[str, list]:
    """Name -> [exit status, stdout, stderr]."""
    wanted: dict[str, dict] = {}
    for name, text in (RUNS | AGAIN | OTHER).items():
        words = [str(folder / w) if (folder / w.partition("@")[0]).exists() else w for w in text.split()]
        if name not in OTHER:
            output = folder / ("again" if name in AGAIN else name)
            words = [str(folder / "model"), *SMALL, "--output", str(output), *words]
        wanted[name] = {"name": name, "words": ["tune", *words]}
    wanted["wandb"]["path"] = str(folder / "packages")
    changed = lines(ALPACA).replace("It is 4.", "It is 5.")
    wanted["again with other data"]["write"] = [str(folder / "again.jsonl"), changed]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("commands.py"))],
        input=json.dumps(list(wanted.values())),
        capture_output=True,
        text=True,
        timeout=250,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def settings_of(folder: Path, name: str) -> dict:
    return json.loads((folder / name / "checkpoints/step-00000002/state.json").read_text())["settings"]


@pytest.mark.parametrize("name", ["guide", "tools", "sharegpt", "skipped", "dropped", "text", "wandb", "yaml"])
def test_a_run_trains_and_leaves_its_result(folder, ran, name):
    code, out, err = ran[name]
    assert (code, out) == (0, ""), err
    assert len([row for row in read_metrics(folder / name) if "loss" in row]) == 2
    assert (folder / name / "loss.png").read_bytes().startswith(b"\x89PNG")
    kind = "model" if name == "text" else "adapter"
    assert list((folder / name / kind).glob("*.safetensors"))
    assert f"The {kind} of step 2 is in {folder / name / kind}. Try it: qwenfit chat" in err


def test_what_becomes_of_the_rows_is_said(ran):
    assert "16 rows, 24 samples" in ran["guide"][2]  # eight of them twice
    assert "step 1: evaluation loss" in ran["guide"][2] and "step 2: evaluation loss" in ran["guide"][2]
    assert "9 rows, 8 samples" in ran["skipped"][2] and "1 bad rows are left out" in ran["skipped"][2]
    assert "are in the training data too" in ran["skipped"][2]
    assert "5 rows, 4 samples" in ran["dropped"][2] and "too long and are left out" in ran["dropped"][2]
    assert "Plan: " in ran["text"][2] and "2 steps of 2 micro-batches" in ran["text"][2]


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("bad", 5, ("bad.jsonl:2", "has no output", "--skip-bad")),
        ("long", 5, ("long.jsonl:5", "more than the 64", "--on-long truncate")),
        ("format", 5, ("alpaca.jsonl:1", "conversations is missing")),
        ("deepspeed", 2, ("torchrun",)),
        ("nothing to evaluate", 2, ("nothing to evaluate with", "--eval-share")),
        ("typo", 2, ("no setting 'learning_rat'", "Did you mean")),
        ("no wandb", 4, ("wandb, which is not installed", "pip install wandb")),
        ("no tensorboard", 4, ("tensorboard, which is not installed", "pip install tensorboard")),
    ],
)
def test_what_cannot_be_is_one_sentence_before_weights_are_read(folder, ran, name, code, words):
    if name.startswith("no ") and find_spec(name.removeprefix("no ")) is not None:
        pytest.skip("it is installed")
    got, _, err = ran[name]
    assert got == code
    assert "Traceback" not in err and err.count("error: ") == 1
    assert all(word in err for word in words), err
    assert not (folder / name).exists()


def test_what_became_of_a_run_is_json_where_it_is_asked_for(folder, ran):
    code, out, _ = ran["json"]
    told, rows = json.loads(out), read_metrics(folder / "json")
    assert code == told["exit_code"] == 0 and (told["step"], told["of"], told["bad_steps"]) == (2, 2, 0)
    assert told["result"] == str(folder / "json" / "adapter") and told["loss"] == rows[1]["loss"]
    assert told["eval_loss"] == rows[-1]["eval_loss"] and told["tokens"] == rows[0]["tokens"] + rows[1]["tokens"]


def test_flags_win_over_yaml(folder, ran):
    got = settings_of(folder, "yaml")
    assert got["lr"] == 5e-4
    wanted = {"format": "sharegpt", "on_long": "drop", "skip_bad": True, "eval_share": 0.25, "pad": False}
    assert {name: got[name] for name in wanted} == wanted and got["keep"] == "all" and got["seq_len"] == 64


def test_a_preview_marks_what_is_trained_and_counts(folder, ran):
    code, out, _ = ran["preview"]
    assert code == 0 and out.count("guide.json:") == 2
    assert "⟦It is 0.<|im_end|>" in out and "What is 0 and 0?⟦<|im_end|>" in out
    assert "2 of " in out and " trained." in out
    assert "⟦" in ran["previewed"][1] and "tool_call" in ran["previewed"][1]
    assert ran["backward preview"][0] == 2 and "--preview" in ran["backward preview"][2]


def test_a_preview_says_how_many_rows_and_steps_the_samples_make(folder, ran):
    counts = re.search(r"8 samples, (\d+) tokens, (\d+) of them trained", ran["packed preview"][1])
    assert counts is not None
    rows, learned = -(-int(counts[1]) // 256), int(counts[2])  # short samples fill the rows
    assert f"8 samples packed into {rows:,} rows of at most 256 tokens" in ran["packed preview"][1]
    assert f"{-(-5 * rows // 8)} steps" in ran["packed preview"][1]
    steps = -(-5 * rows // 8)
    assert f"each of about {5 * learned / steps:,.0f} trained tokens" in ran["packed preview"][1]
    assert "8 samples in 8 rows of at most 256 tokens" in ran["previewed"][1]


def test_what_is_logged_reaches_weights_and_biases(folder, ran):
    assert (folder / "wandb" / "wandb.txt").read_text().splitlines() == ["project 4", "1 True", "2 True"]


def test_a_resumed_run_must_find_the_data_and_the_settings_it_had(folder, ran):
    assert [ran[name][0] for name in AGAIN] == [0, 0, 2, 2]
    assert "Resuming from step-00000002." in ran["again resumed"][2]
    assert "had mask = 'assistant_only', and now it is 'all'" in ran["again with another mask"][2]
    assert "The data has changed" in ran["again with other data"][2]


def test_torchrun_starts_it_in_two_processes(folder):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "qwenfit"]
    words = ["tune", str(folder / "model"), *SMALL, "-d", str(folder / "guide.json"), "-o", str(folder / "torchrun")]
    done = subprocess.run(
        [*command, *words, "--zero", "3"], env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "2 processes with shards of the network (ZeRO-3)" in done.stderr
    assert done.stderr.count("Plan: ") == done.stderr.count("8 rows, 8 samples") == 1  # rank 0 talks
    row = read_metrics(folder / "torchrun")[-1]
    assert row["planned_memory"] == pytest.approx(row["memory"], rel=0.15)  # a process of next to no tensors
    assert len(read_metrics(folder / "torchrun")) == 2 and (folder / "torchrun" / "adapter").is_dir()
