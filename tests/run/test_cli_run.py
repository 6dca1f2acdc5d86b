"""The running verbs as a user types them: each in a process of its own, on a tiny model, without a network."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.run.conftest import ROOT, Result, environment

Cli = Callable[..., Result]
GREEDY = ("--set", "temperature=0")


def rows_of(path: Path) -> dict[object, dict[str, object]]:
    return {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def failed(result: Result, code: int, says: str) -> None:
    """One sentence on stderr with the cause, then at most one line with the next thing to try."""
    lines = result.stderr.splitlines()
    assert result.returncode == code, result.stderr
    assert len(lines) <= 2 and lines[0].startswith("error: ") and lines[0].endswith((".", "?", ")")), result.stderr
    assert says in result.stderr and all(line.startswith("  try: ") for line in lines[1:])


# chat


def test_a_prompt_a_pipe_and_statistics(cli: Cli, tiny: Path) -> None:
    one_shot = cli("chat", tiny, "-p", "hello", *GREEDY, "--set", "max_tokens=12", "--stats")
    assert one_shot.returncode == 0 and len(one_shot.stdout) > 10
    assert re.search(r"decode .* tokens/s over 12, .* planned", one_shot.stderr)
    assert re.search(r"memory .* GB measured, .* GB planned", one_shot.stderr)
    piped = cli("chat", tiny, *GREEDY, "--set", "max_tokens=12", stdin="hello")
    assert piped.returncode == 0 and piped.stdout == one_shot.stdout and piped.stderr == ""


class Terminal:
    """qwenfit on a pseudo-terminal: what a person sees and types."""

    def __init__(self, cwd: Path, *arguments: object) -> None:
        self.seen = ""
        self.ended: int | None = None
        self.pid, self.file = pty.fork()
        if self.pid == 0:
            os.chdir(cwd)
            command = [sys.executable, "-m", "qwenfit", *map(str, arguments)]
            os.execve(sys.executable, command, environment())

    def _read(self, seconds: float) -> bool:
        """More of what it writes, if any comes within `seconds`; False when none came."""
        if not select.select([self.file], [], [], max(0.0, seconds))[0]:
            return False
        self.seen += os.read(self.file, 65536).decode(errors="replace")
        return True

    def until(self, text: str, seconds: float = 120, again: str = "") -> str:
        """Read up to `text`; returns what came before it. `again` is typed whenever nothing came for 5 seconds."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} did not come: {self.seen[-500:]!r}"
            try:
                if not self._read(min(5.0, deadline - time.monotonic())) and again:
                    self.type(again)
            except OSError:  # the other side has closed
                raise AssertionError(f"it ended before {text!r}: {self.seen[-500:]!r}") from None
        before, _, self.seen = self.seen.partition(text)
        return before

    def until_written(self, characters: int, seconds: float = 120) -> None:
        """Read so many characters, whatever they are."""
        deadline = time.monotonic() + seconds
        while len(self.seen) < characters:
            assert time.monotonic() < deadline, f"no more came: {self.seen[-500:]!r}"
            self._read(deadline - time.monotonic())

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def exit_code(self) -> int:
        while True:
            try:
                self.seen += os.read(self.file, 65536).decode(errors="replace")
            except OSError:  # the other side has closed
                break
        _, status = os.waitpid(self.pid, 0)
        os.close(self.file)
        self.ended = os.waitstatus_to_exitcode(status)
        return self.ended


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Starts qwenfit on a terminal in tmp_path; one that a failed test leaves behind is ended."""
    opened: list[Terminal] = []

    def start(*arguments: object) -> Terminal:
        opened.append(Terminal(tmp_path, *arguments))
        return opened[-1]

    yield start
    for screen in opened:
        if screen.ended is None:
            os.kill(screen.pid, signal.SIGKILL)
            screen.exit_code()


def test_the_conversation_in_a_terminal(terminal: Callable[..., Terminal], tiny: Path, tmp_path: Path) -> None:
    """Ctrl-C in an answer stops the answer; what was said is saved and read back; /bye leaves."""
    endless = ("--set", "ignore_eos=true", "--context", 30000)
    screen = terminal("chat", tiny, *GREEDY, *endless)
    screen.until("/? for help.")
    screen.until("> ")
    screen.type("tell me everything\n")
    screen.until("everything")
    screen.until_written(500)  # the answer is under way
    screen.type("\x03")
    screen.until("(stopped)")
    screen.until("> ")
    screen.type("/stats\n")
    assert "GB planned" in screen.until("%)")
    screen.type("/set max_tokens 5\n")
    screen.until("max_tokens = 5")
    screen.type("/nonsense\n")
    screen.until("There is no command /nonsense")
    screen.until("> ")
    screen.type("\x03")  # at the prompt: nothing to stop
    # Python's readline does not see one that comes after it wrote its prompt and before it waits for a key.
    screen.until("/bye or Ctrl-D leaves", again="\x03")
    screen.type("and this\n")
    screen.until("> ")
    screen.type("/save talk.json\n")
    screen.until("saved 4 messages")
    screen.type("/bye\n")
    assert screen.exit_code() == 0
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"] * 2
    assert saved["messages"][1]["content"] and saved["sampling"]["max_tokens"] == 5


def test_control_c_in_a_one_shot_leaves_with_130(terminal: Callable[..., Terminal], tiny: Path) -> None:
    screen = terminal("chat", tiny, "-p", "go", *GREEDY, "--set", "ignore_eos=true", "--context", 30000)
    screen.until_written(2000)  # the answer is under way
    screen.type("\x03")
    assert screen.exit_code() == 130
    assert "Traceback" not in screen.seen


# generate


def test_a_killed_run_goes_on_where_it_stopped(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    """Float32, greedy: what two runs answer between them is what one run answers."""
    source = tmp_path / "prompts.jsonl"
    jobs = [{"id": f"q{i}", "prompt": f"hello {i}", "max_tokens": 40 + 20 * (i % 5)} for i in range(40)]
    source.write_text("".join(json.dumps(job) + "\n" for job in jobs))
    options = (*GREEDY, "--set", "ignore_eos=true", "--precision", "fp32", "--context", 300, "--batch", 4)
    whole = cli("generate", tiny, "-i", source, "-o", "whole.jsonl", *options)
    assert whole.returncode == 0 and "40 answered, 0 were there before" in whole.stderr
    target = tmp_path / "part.jsonl"
    command = [sys.executable, "-m", "qwenfit", "generate", str(tiny), "-i", str(source), "-o", str(target)]
    running = subprocess.Popen([*command, *map(str, options)], env=environment(), stderr=subprocess.DEVNULL)
    while not target.exists() or target.read_bytes().count(b"\n") < 3:
        assert running.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    there = target.read_bytes().count(b"\n")
    assert 3 <= there < 40
    again = cli("generate", tiny, "-i", source, "-o", target, *options)
    assert f"{40 - there} answered, {there} were there before" in again.stderr
    assert rows_of(target) == rows_of(tmp_path / "whole.jsonl")
    assert target.read_bytes().count(b"\n") == 40


def test_a_prompt_beyond_the_context_names_its_line(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n' + json.dumps({"prompt": "hello " * 500}) + "\n")
    result = cli("generate", tiny, "-i", "in.jsonl", "-o", "out.jsonl", "--context", 100)
    failed(result, 3, "line 2")
    assert not (tmp_path / "out.jsonl").exists()


def test_memory_does_not_grow_with_requests(tiny: Path, tmp_path: Path) -> None:
    """Resident memory after 1,000 requests is that after 10; files of 10, as a queue takes memory while it waits."""
    script = """
import json, sys
from pathlib import Path
import psutil, torch
from qwenfit.engine.params import SamplingParams
from qwenfit.run.generate import generate_file, read_jobs
from qwenfit.run.planned import RunOptions, load_planned
torch.set_num_threads(1)
llm, _ = load_planned(RunOptions(sys.argv[1], context=64, batch=8, device="cpu"))
rss = []
for run in range(101):  # the first warms up
    source = Path(sys.argv[2]) / f"{run}.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"hello {run} {i}", "seed": i}) + "\\n" for i in range(10)))
    generate_file(llm, read_jobs(source), source.with_suffix(".out"), SamplingParams(max_tokens=4, ignore_eos=True))
    rss.append(psutil.Process().memory_info().rss)
print(json.dumps(rss))
"""
    command = [sys.executable, "-c", script, str(tiny), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    _, after_10, *_, after_1000 = json.loads(done.stdout)
    print(f"\nresident after 10 requests {after_10 / 1e6:.1f} MB, after 1,000 {after_1000 / 1e6:.1f} MB")
    assert abs(after_1000 - after_10) < 2e6


# bench


def test_bench_prints_and_records_what_it_measured(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    only_shape = tmp_path / "shape" / "config.json"
    only_shape.parent.mkdir()
    only_shape.write_bytes((tiny / "config.json").read_bytes())
    result = cli("bench", "decode", only_shape, "--random-weights", "--generate", 16, "--repeat", 1, "--json")
    assert result.returncode == 0
    printed = json.loads(result.stdout)
    (file,) = (tmp_path / "measurements").glob("decode-*.json")
    assert json.loads(file.read_text()) == printed
    assert printed["measured"]["decode_tokens_per_s"] > 0 and printed["facts"]["generate"] == 16
    weights = printed["figures"]["weights"]
    assert weights["planned"] == pytest.approx(weights["measured"], rel=0.01)
    prefill = cli("bench", "prefill", only_shape, "--prompt", 64, "--repeat", 1, "--record", "elsewhere")
    assert prefill.returncode == 0 and "prompt tokens per s" in prefill.stdout and "elsewhere" in prefill.stdout


def test_the_guide_s_rows_want_a_gpu(cli: Cli, tmp_path: Path) -> None:
    failed(cli("bench", "guide", CUDA_VISIBLE_DEVICES=""), 1, "no CUDA device")
    assert list(tmp_path.iterdir()) == []


def test_beyond_the_tolerance_is_6_and_the_record_is_kept(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    options = ("--generate", 8, "--repeat", 1, "--tolerance", 1e-9)
    failed(cli("bench", "decode", tiny, *options), 6, "was planned at")
    assert len(list((tmp_path / "measurements").glob("*.json"))) == 1


def test_the_perplexity_of_a_text(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    """Of the uniform distribution it would be the 640 rows of the head; a random model is no better."""
    text = tmp_path / "text.txt"
    text.write_text("hello world, this is a text. " * 40)
    options = ("perplexity", tiny, "--text", text, "--tokens", 200, "--json")
    whole = json.loads(cli("bench", *options, "--no-record").stdout)
    assert whole["measured"]["perplexity"] > 100 and whole["facts"]["scored_tokens"] == 199
    cut = json.loads(cli("bench", *options, "--prompt", 50, "--no-record").stdout)
    assert cut["facts"]["scored_tokens"] == 196
    assert not (tmp_path / "measurements").exists()


# The cache, convert, doctor


def test_the_cache_is_the_ecosystem_s(cli: Cli, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/models--Qwen--Qwen-7B/snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    blob = tmp_path / "hub/models--Qwen--Qwen-7B/blobs/b1"
    blob.parent.mkdir()
    blob.write_bytes(b"\0" * 5_000_000)
    (snapshot / "config.json").symlink_to("../../blobs/b1")
    refs = tmp_path / "hub/models--Qwen--Qwen-7B/refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    here = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    (row,) = json.loads(cli("ls", "--json", **here).stdout)
    assert (row["id"], row["nbytes"]) == ("Qwen/Qwen-7B", 5_000_000)
    failed(cli("rm", "Qwen-7B", **here), 2, "-y")
    failed(cli("rm", "Qwen-14B", "-y", **here), 4, "not in the cache")
    assert blob.exists()
    assert "0.01 GB freed" in cli("rm", "Qwen-7B", "-y", **here).stdout
    assert "no models" in cli("ls", **here).stdout


def cached(cache: Path, repo: str, source: Path) -> dict[str, str]:
    """The files of `source` as the Hub's model `repo` in a cache; returns the environment that finds it."""
    folder = cache / ("models--" + repo.replace("/", "--"))
    shutil.copytree(source, folder / "snapshots" / ("a" * 40))
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text("a" * 40)
    return {"HF_HUB_CACHE": str(cache)}


@pytest.mark.parametrize("name", ["qwen2.5-0.5b-instruct", "Qwen/Qwen2.5-0.5B-Instruct"])
def test_what_was_pulled_by_a_name_runs_by_that_name(cli: Cli, tiny: Path, tmp_path: Path, name: str) -> None:
    here = cached(tmp_path / "hub", "Qwen/Qwen2.5-0.5B-Instruct", tiny)
    options = ("-p", "hello", *GREEDY, "--set", "max_tokens=5", "--precision", "fp32", "--context", 64)
    by_name, by_folder = cli("chat", name, *options, **here), cli("chat", tiny, *options)
    assert by_name.returncode == 0, by_name.stderr
    assert by_name.stdout == by_folder.stdout


def test_a_pulled_qwen1_is_converted_by_its_name(cli: Cli, tmp_path: Path) -> None:
    here = cached(tmp_path / "hub", "Qwen/Qwen-1_8B-Chat", ROOT / "tests/golden/qwen1/c_ntk")
    result = cli("convert", "Qwen-1.8B-Chat", "out", "--json", **here)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["tensors"] == 27
    failed(cli("convert", "Qwen-7B-Chat", "other", **here), 4, "qwenfit pull Qwen-7B-Chat")


def test_the_model_s_own_sampling_is_where_a_chat_starts(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    """do_sample false is greedy: two runs say the same, and what --set says."""
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    (folder / "generation_config.json").write_text('{"eos_token_id": [578], "do_sample": false}')
    options = ("-p", "hello", "--set", "max_tokens=12", "--json")
    first, again, told = (
        cli("chat", folder, *options),
        cli("chat", folder, *options),
        cli("chat", tiny, *options, *GREEDY),
    )
    texts = [json.loads(result.stdout)["text"] for result in (first, again, told)]
    assert texts[0] == texts[1] == texts[2]
    assert json.loads(first.stdout)["completion_tokens"] == 12
    (folder / "generation_config.json").write_text('{"top_p": 7}')
    failed(cli("chat", folder, *options), 5, "top_p lies above 0")


def test_a_terminal_that_is_not_utf8_shows_what_it_can(cli: Cli, tiny: Path) -> None:
    options = ("-p", "hello", *GREEDY, "--set", "max_tokens=12")
    result = cli("chat", tiny, *options, PYTHONUTF8="0", PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and "?" in result.stdout and result.stdout.isascii()


def test_pulling_without_a_network_is_4(cli: Cli, tmp_path: Path) -> None:
    here = {"HF_HUB_CACHE": str(tmp_path / "hub")}
    failed(cli("pull", "Qwen-1.8B", **here), 4, "not reachable")
    failed(cli("pull", "nosuchmodel", **here), 4, "There is no model")
    failed(cli("pull", "a/b/c", **here), 4, "no possible name")


def test_convert_writes_once(cli: Cli, tmp_path: Path) -> None:
    source = ROOT / "tests/golden/qwen1/b_plain_base1e6"
    result = cli("convert", source, "out")
    assert result.returncode == 0 and "Equal: logits" in result.stdout
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "qwen2"
    before = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    failed(cli("convert", source, "out"), 2, "not empty")
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == before


def test_convert_dequantises_gptq_where_asked(cli: Cli, tmp_path: Path) -> None:
    """As Qwen-7B-Chat-Int4 is laid out: packed under Qwen2's names for vLLM, or plain 16-bit weights."""
    from safetensors.torch import load_file

    source = ROOT / "tests/golden/qwen1_gptq/int4"
    packed = cli("convert", source, "packed")
    assert packed.returncode == 0 and "quantization_config" in (tmp_path / "packed/config.json").read_text()
    assert load_file(tmp_path / "packed/model.safetensors")["model.layers.0.mlp.up_proj.qweight"].dtype.itemsize == 4
    plain = cli("convert", source, "plain", "--dequantize", "--dtype", "float16")
    assert plain.returncode == 0 and "were dequantised" in plain.stdout
    weights = load_file(tmp_path / "plain/model.safetensors")
    assert "quantization_config" not in (tmp_path / "plain/config.json").read_text()
    assert str(weights["model.layers.0.mlp.up_proj.weight"].dtype) == "torch.float16"
    failed(cli("convert", source, "other", "--dtype", "int4"), 2, "float16")


def test_doctor_says_what_runs(cli: Cli) -> None:
    checks = json.loads(cli("doctor", "--json").stdout)
    assert {"versions", "device", "kernel"} <= {check["topic"] for check in checks}
    kernels = [check["text"] for check in checks if check["topic"] == "kernel"]
    assert len(kernels) >= 8 and any("decode attention" in text for text in kernels)
    assert any("rounding to int8" in text for text in kernels)
    guide = [check["text"] for check in checks if check["topic"] == "guide"]
    assert any(text.startswith("CUDA: the guide recommends 11.4") for text in guide) and len(guide) == 9
    assert all(check["fix"] for check in checks if check["status"] == "missing")
    assert "decode" in cli("doctor").stdout


# What goes wrong

WITHOUT = """
import sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] == PACKAGE else Real.find_spec(name, path, target)
Real = next(f for f in sys.meta_path if getattr(f, "__name__", "") == "PathFinder")
sys.meta_path[sys.meta_path.index(Real)] = Finder
from qwenfit.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("package", "extra", "verb"),
    [
        ("torch", "run", ("chat", "-p", "hi")),
        ("torch", "run", ("bench", "decode")),
        ("tokenizers", "run", ("chat", "-p", "hi")),
    ],
)
def test_a_missing_package_names_its_extra(
    tiny: Path, tmp_path: Path, package: str, extra: str, verb: tuple[str, ...]
) -> None:
    command = [sys.executable, "-c", WITHOUT.replace("PACKAGE", repr(package)), *verb, str(tiny)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), input="", capture_output=True, text=True, timeout=120
    )
    failed(done, 4, f"needs the package {package}, which is not installed.")
    assert f"pip install 'qwenfit[{extra}]'" in done.stderr


def test_without_torch_a_plan_is_made_and_doctor_says_what_to_install(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT.replace("PACKAGE", "'torch'")]
    options = {"cwd": tmp_path, "env": environment(), "capture_output": True, "text": True, "timeout": 120}
    assert subprocess.run([*command, "plan", "Qwen-7B", "--gpu", "RTX 3090"], **options).returncode == 0  # type: ignore[call-overload]
    checks = json.loads(subprocess.run([*command, "doctor", "--json"], **options).stdout)  # type: ignore[call-overload]
    (torch,) = [check for check in checks if check["topic"] == "package" and check["text"].startswith("torch:")]
    assert torch["status"] == "missing" and "qwenfit[run]" in torch["fix"]


def test_what_does_not_fit_is_refused_before_anything_is_loaded(cli: Cli) -> None:
    huge = ("--precision", "fp32", "--device", "cpu")  # 289 GB of weights
    failed(cli("chat", "Qwen-72B", "-p", "hi", *huge), 3, "needs")
    failed(cli("bench", "decode", "Qwen-72B", "--random-weights", *huge), 3, "needs")


CRAMPED = """
import resource, sys
import torch, qwenfit.engine.llm, qwenfit.checkpoint.load
from qwenfit.cli import main
virtual = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (virtual + 300_000_000,) * 2)
main(sys.argv[1:])
"""


def test_memory_that_runs_out_is_one_sentence_and_3(tiny: Path, tmp_path: Path) -> None:
    """The plan found it free; a limit that it cannot see (ulimit -v) says no. 537 MB of cache into 300."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "hi"}\n')
    options = ("--context", "32768", "--batch", "16", "--kv-cache", "fp32", "--device", "cpu")
    command = [sys.executable, "-c", CRAMPED, "generate", str(tiny), "-i", "in.jsonl", "-o", "out.jsonl", *options]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120)
    failed(done, 3, "Memory ran out")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("chat", "TINY", "-p", "hi", "--precison", "int4"), 2, "--precision"),
        (("chat", "TINY", "-p", "hi", "--precision", "int3"), 2, "int4"),
        (("chat", "TINY", "-p", "hi", "--kv-cache", "int3"), 2, "int8"),
        (("chat", "TINY", "-p", "hi", "--device", "tpu"), 2, "--device cpu"),
        (("chat", "TINY", "-p", "hi", "--threads", 0), 2, "threads"),
        (("chat", "TINY", "-p", "hi", "--threads", 10**6), 2, "threads"),
        (("chat", "TINY", "-p", "hi", "--context", 0), 2, "context"),
        (("chat", "TINY", "-p", "hi", "--context", 10**7), 2, "32768"),
        (("chat", "TINY", "-p", "hi", "--set", "temprature=0"), 2, "Did you mean temperature"),
        (("chat", "TINY", "-p", "hi", "--set", "temperature=-1"), 2, "between 0"),
        (("chat", "TINY", "-p", "hi", "--set", "temperature"), 2, "NAME=VALUE"),
        (("chat", "TINY", "-p", "  "), 2, "empty"),
        (("chat", "TINY"), 2, "empty"),
        (("chat", "Kwen-7B", "-p", "hi"), 4, "Did you mean Qwen-7B"),
        (("chat", "Qwen-1.8B", "-p", "hi", "--device", "cpu"), 4, "qwenfit pull Qwen-1.8B"),
        (("chat", "someone/model", "-p", "hi"), 4, "HF_HUB_OFFLINE"),
        (("chat", "./none", "-p", "hi"), 4, "no file or folder"),
        (("generate", "TINY", "-i", "none.jsonl", "-o", "out.jsonl"), 4, "cannot be read"),
        (("generate", "TINY", "-i", "TINY/config.json", "-o", "out.jsonl"), 5, "line 1"),
        (("chat", "TINY", "-p", "hi", "--set", "n=2"), 2, "one answer at a time"),
        (("chat", "TINY", "--json"), 2, "The prompt is empty"),
        (("bench", "decode"), 2, "Which model"),
        (("bench", "demo", "Qwen-7B"), 2, "picks the model"),
        (("bench", "decode", "TINY", "--prompt", 0), 2, "prompt"),
        (("bench", "decode", "TINY", "--batch", -1), 2, "batch"),
        (("bench", "decode", "TINY", "--tolerance", -1), 2, "tolerance"),
        (("bench", "decode", "TINY", "--record", "TINY/config.json"), 4, "cannot be written"),
        (("bench", "perplexity", "TINY"), 2, "--text FILE"),
        (("bench", "perplexity", "TINY", "--text", "none.txt"), 4, "cannot be read"),
        (("bench", "perplexity", "TINY", "--text", "TINY/model.safetensors"), 5, "UTF-8"),
        (("bench", "guide", "Qwen-9B"), 2, "no inference rows"),
        (("bench", "guide", "--json"), 2, "its record is the JSON"),
        (("bench", "decode", "TINY", "--out", "x.md"), 2, "belong to"),
        (("bench", "perplexity", "TINY", "--profile"), 2, "no profile"),
        (("compare", "Kwen-7B"), 4, "Did you mean Qwen-7B"),
        (("compare", "TINY", "--generate", 1), 2, "generate"),
        (("compare", "TINY", "--record", "TINY/config.json"), 4, "cannot be written"),
        (("convert", "TINY", "out"), 2, "nothing to convert"),
        (("frobnicate",), 2, "No such command"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_sentence_and_its_code(
    cli: Cli, tiny: Path, tmp_path: Path, arguments: tuple[object, ...], code: int, says: str
) -> None:
    result = cli(*(str(a).replace("TINY", str(tiny)) for a in arguments))
    failed(result, code, says)
    assert result.stdout == "" and list(tmp_path.iterdir()) == []
