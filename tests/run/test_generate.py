"""Files of prompts: every line answered once, whatever happens in between."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenfit.engine.output import Delta, TokenLogprob
from qwenfit.engine.params import SamplingParams
from qwenfit.errors import BadFile, NotFound, QwenfitError, UsageError
from qwenfit.run.generate import finished_ids, generate_file, read_jobs

sys.path.insert(0, str(Path(__file__).parent))
from fake_llm import FakeLLM


def write(path: Path, *rows: object) -> Path:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def rows_of(path: Path) -> dict[object, dict[str, object]]:
    return {row["id"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def test_each_line_is_answered_under_its_id(tmp_path: Path) -> None:
    source = write(
        tmp_path / "in.jsonl", {"prompt": "a b"}, "", {"id": "x", "messages": [{"role": "user", "content": "hi"}]}
    )
    target = tmp_path / "out" / "answers.jsonl"
    assert generate_file(FakeLLM(), read_jobs(source), target, SamplingParams()) == (2, 0)
    rows = rows_of(target)
    assert rows[1]["text"] == "A B " and rows["x"]["text"] == "HI "
    assert rows[1]["finish_reason"] == "stop" and rows[1]["prompt_tokens"] == 2


def test_a_second_run_answers_only_what_is_left(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", *({"prompt": f"p{i}"} for i in range(5)))
    target = tmp_path / "out.jsonl"
    generate_file(FakeLLM(), read_jobs(source), target, SamplingParams())
    whole = target.read_text()
    lines = whole.splitlines(keepends=True)
    target.write_text("".join(lines[:2]) + lines[2][: len(lines[2]) // 2])  # a crash in the middle of a line
    assert generate_file(FakeLLM(), read_jobs(source), target, SamplingParams()) == (3, 2)
    assert rows_of(target) == {row["id"]: row for row in map(json.loads, whole.splitlines())}
    assert generate_file(FakeLLM(), read_jobs(source), target, SamplingParams()) == (0, 5)


def test_interrupted_answers_are_kept(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "one two three"}, {"prompt": "x"})
    target = tmp_path / "out.jsonl"
    with pytest.raises(KeyboardInterrupt):
        generate_file(FakeLLM(interrupt_after=1), read_jobs(source), target, SamplingParams())
    assert finished_ids(target) == {2}


def test_own_sampling_parameters_and_several_answers(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "a", "n": 2, "temperature": 0.5})
    target = tmp_path / "out.jsonl"
    generate_file(FakeLLM(), read_jobs(source), target, SamplingParams())
    assert [a["text"] for a in rows_of(target)[1]["answers"]] == ["A ", "A "]  # type: ignore[union-attr,index]


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["nonsense"], "line 1: not JSON"),
        (["[1]"], "line 1"),
        ([{"prompt": "a"}, {"text": "a"}], "line 2"),
        ([{"prompt": "a", "messages": []}], "line 1"),
        ([{"prompt": 5}], "not a text"),
        ([{"prompt": "a", "id": 1.5}], "id"),
        ([{"prompt": "a", "id": "q"}, {"prompt": "b", "id": "q"}], "there before"),
        ([{"prompt": "a", "temprature": 1}], "temprature"),
        ([{"prompt": "a", "temperature": -1}], "line 1"),
        ([{"prompt": "  "}], "empty"),
        ([{"prompt": "a"}, {"messages": []}], "line 2: Messages"),
        ([{"messages": [{"role": "user", "content": 5}]}], "line 1: Message 0"),
        ([], "no prompts"),
        (["[" * 100_000], "not JSON"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path: Path, rows: list[object], says: str) -> None:
    source = write(tmp_path / "in.jsonl", *rows)
    target = tmp_path / "out.jsonl"
    with pytest.raises(BadFile, match=says):
        generate_file(FakeLLM(), read_jobs(source), target, SamplingParams())
    assert not target.exists()


def test_values_are_checked_before_a_model_is_there(tmp_path: Path) -> None:
    for row in ({"prompt": "a", "n": 0}, {"messages": [{"role": "thief", "content": "a"}]}):
        with pytest.raises(BadFile, match="line 2"):
            read_jobs(write(tmp_path / "in.jsonl", {"prompt": "b"}, row))


def test_log_probabilities_that_were_asked_for_are_written(tmp_path: Path) -> None:
    class WithLogprobs(FakeLLM):
        def _deltas(self, *arguments: Any) -> Iterator[Delta]:
            for delta in super()._deltas(*arguments):
                delta.logprobs = [TokenLogprob(7, -0.5, ((7, -0.5), (9, -2.0)))]
                yield delta

    target = tmp_path / "out.jsonl"
    jobs = read_jobs(write(tmp_path / "in.jsonl", {"prompt": "a b", "logprobs": 2}))
    generate_file(WithLogprobs(), jobs, target, SamplingParams())
    one = {"token_id": 7, "logprob": -0.5, "top": [[7, -0.5], [9, -2.0]]}
    assert rows_of(target)[1]["logprobs"] == [one, one]


def test_an_output_without_an_end_is_not_read(tmp_path: Path) -> None:
    """As /dev/full: it would have been read until memory ran out."""
    os.mkfifo(tmp_path / "pipe")
    for path in (Path("/dev/full"), tmp_path, tmp_path / "pipe"):
        with pytest.raises(UsageError, match="is not a file"):
            finished_ids(path)


def test_missing_binary_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        read_jobs(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadFile, match="UTF-8"):
        read_jobs(tmp_path / "binary")
    foreign = write(tmp_path / "foreign.jsonl", {"not": "ours"})
    before = foreign.read_bytes()
    with pytest.raises(BadFile, match="not an output"):
        finished_ids(foreign)
    assert foreign.read_bytes() == before


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", {"prompt": "a"})
    (tmp_path / "file").write_text("")
    with pytest.raises(QwenfitError, match="cannot be"):
        generate_file(FakeLLM(), read_jobs(source), tmp_path / "file" / "out.jsonl", SamplingParams())
