"""`qwenfit generate`: a file of prompts in, a file of answers out; an interrupted run goes on where it stopped.

Input, one JSON object a line: {"prompt": "..."} or {"messages": [...]}, with an optional "id" and any sampling
parameter. Output, one line each as answers finish: {"id", "text", "finish_reason", "prompt_tokens", ...}.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from qwenfit.chat.messages import plain_messages
from qwenfit.engine.params import SamplingParams
from qwenfit.errors import BadFile, DoesNotFit, NotFound, QwenfitError, UsageError

if TYPE_CHECKING:
    from qwenfit.engine.llm import LLM
    from qwenfit.engine.output import Completion, TokenLogprob

MAX_LINE = 8 * 2**20  # characters of one input line
MAX_ANSWER = 2**30  # bytes of one output line: 128 long answers with 20 log-probabilities a token are far below
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """One input line: its id (its line number where it has none), and what to answer."""

    id: str | int
    line: int
    request: dict[str, Any]


def read_jobs(path: Path) -> list[Job]:
    """Every line checked before anything runs. Raises NotFound, or BadFile naming the line."""
    jobs, seen = [], set()
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), ""), start=1):
                if len(line) > MAX_LINE:
                    raise BadFile(f"{path}, line {number}: longer than {MAX_LINE // 2**20} MiB.")
                if not line.strip():
                    continue
                job = _job(path, number, line)
                if job.id in seen:
                    raise BadFile(f"{path}, line {number}: the id {job.id!r} was there before.")
                seen.add(job.id)
                jobs.append(job)
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is not UTF-8 text.") from error
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}.", "--input FILE, one JSON object a line") from error
    if not jobs:
        raise BadFile(f"{path} has no prompts.", 'One JSON object a line: {"prompt": "..."}')
    return jobs


def _job(path: Path, number: int, line: str) -> Job:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{path}, line {number}: not JSON.") from error
    if not isinstance(request, dict) or ("prompt" in request) == ("messages" in request):
        raise BadFile(f'{path}, line {number}: an object with either "prompt" or "messages" is expected.')
    if "prompt" in request and not isinstance(request["prompt"], str):
        raise BadFile(f'{path}, line {number}: "prompt" is not a text.')
    identity = request.get("id", number)
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise BadFile(f'{path}, line {number}: "id" is neither a text nor a whole number.')
    params_for(request, SamplingParams(), number)
    if "messages" in request:
        with _of_line(number):
            plain_messages(request["messages"])
    return Job(identity, number, request)


@contextmanager
def _of_line(number: int) -> Iterator[None]:
    """What is wrong with a request is wrong with its line of the file."""
    try:
        yield
    except (UsageError, TypeError) as error:
        raise BadFile(f"line {number}: {getattr(error, 'message', error)}", getattr(error, "hint", None)) from error


def finished_ids(path: Path) -> set[str | int]:
    """Ids that an earlier run wrote; a last line cut short by a crash is removed.

    Raises BadFile for a file of something else, UsageError for what is no file (a device may have no end), NotFound.
    """
    try:
        return _finished_ids(path) if path.exists() else set()
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}.") from error


def _finished_ids(path: Path) -> set[str | int]:
    if not path.is_file():
        raise UsageError(f"{path} is not a file, so a run could not go on there.", "--output answers.jsonl")
    done: set[str | int] = set()
    good = 0
    with path.open("rb+") as file:
        for raw in iter(lambda: file.readline(MAX_ANSWER), b""):
            try:
                row = json.loads(raw)
                identity = row["id"]
                complete = raw.endswith(b"\n")
            except (ValueError, KeyError, TypeError) as error:
                if raw.endswith(b"\n"):
                    raise BadFile(f"{path} is not an output of qwenfit generate.", "Name another --output.") from error
                complete = False
            if not complete:
                break
            done.add(identity)
            good += len(raw)
        file.truncate(good)
    return done


def params_for(request: dict[str, Any], base: SamplingParams, line: int) -> SamplingParams:
    """The line's own sampling parameters over the run's. Raises BadFile naming the line."""
    names = {f.name for f in fields(base)}
    own = {key: value for key, value in request.items() if key in names}
    unknown = request.keys() - names - {"id", "prompt", "messages"}
    if unknown:
        raise BadFile(f"line {line}: {', '.join(sorted(unknown))} is no sampling parameter.")
    with _of_line(line):
        return replace(base, **own)


def generate_file(
    llm: LLM, jobs: list[Job], target: Path, base: SamplingParams, progress: Progress | None = None
) -> tuple[int, int]:
    """Answer every job that `target` does not have yet; returns (answered now, there before).

    All requests go through the engine together. Each answer is written and synced as it finishes.
    """
    done = finished_ids(target)
    left = [job for job in jobs if job.id not in done]
    prompts, params = [], []
    for job in left:
        params.append(params_for(job.request, base, job.line))
        prompts.append(_encode(llm, job))
    if not left:
        return 0, len(jobs)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a", encoding="utf-8") as file:
            for count, (job, row) in enumerate(_answers(llm, left, prompts, params), start=1):
                _write(file, {"id": job.id} | row)
                if progress is not None:
                    progress(count, len(left))
    except OSError as error:
        raise QwenfitError(
            f"{target} cannot be written: {error.strerror}; what was answered before is kept.", "run the same again"
        ) from error
    return len(left), len(jobs) - len(left)


def _encode(llm: LLM, job: Job) -> list[int]:
    if llm.tokenizer is None:
        raise UsageError("Texts need a tokenizer, and this model was loaded without one.")
    if "prompt" in job.request:
        ids: list[int] = llm.tokenizer.encode(job.request["prompt"])
    else:
        with _of_line(job.line):  # some templates refuse an order of roles
            ids = llm.tokenizer.apply_chat_template(job.request["messages"])
    if not ids:
        raise BadFile(f"line {job.line}: the prompt is empty.")
    if len(ids) >= llm.max_model_len:
        raise DoesNotFit(
            f"line {job.line}: the prompt has {len(ids)} tokens; with an answer at most {llm.max_model_len} fit.",
            f"--context {len(ids) + 512}",
        )
    return ids


def _answers(
    llm: LLM, jobs: list[Job], prompts: list[list[int]], params: list[SamplingParams]
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Each job with its output row, in the order in which they finish."""
    from qwenfit.engine.output import Delta, collect

    parts: list[list[Delta]] = [[] for _ in jobs]
    unfinished = [wanted.n for wanted in params]
    for delta in llm.generate(prompts, params, stream=True):
        index = delta.request_id
        parts[index].append(delta)
        if delta.finish_reason is None:
            continue
        unfinished[index] -= 1
        if not unfinished[index]:
            for part in parts[index]:
                part.request_id = 0
            output = collect([prompts[index]], [params[index]], parts[index])[0]
            parts[index] = []
            yield jobs[index], _row(output.completions)


def _row(completions: list[Completion]) -> dict[str, Any]:
    rows = [
        {
            "text": c.text,
            "finish_reason": c.finish_reason,
            "prompt_tokens": c.stats.prompt_tokens,
            "completion_tokens": c.stats.completion_tokens,
            **({"logprobs": [_logprob(p) for p in c.logprobs]} if c.logprobs is not None else {}),
            **({"error": c.error} if c.error else {}),
        }
        for c in completions
    ]
    return rows[0] if len(rows) == 1 else {"answers": rows}


def _logprob(of: TokenLogprob) -> dict[str, Any]:
    return {"token_id": of.token_id, "logprob": of.logprob, "top": [list(pair) for pair in of.top]}


def _write(file: TextIO, row: dict[str, Any]) -> None:
    file.write(json.dumps(row, ensure_ascii=False) + "\n")
    file.flush()
    with suppress(OSError):  # a pipe cannot be synced
        os.fsync(file.fileno())


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """Answers done of all, on stderr; None where stderr is no terminal."""
    import sys

    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    with Bar(BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task("answers", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
