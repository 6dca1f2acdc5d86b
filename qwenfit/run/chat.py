"""`qwenfit chat`: a conversation in the terminal, one answer (`-p`), or one prompt from a pipe."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenfit.errors import BadFile, DoesNotFit, NotFound, QwenfitError, UsageError, nearest
from qwenfit.planning.types import Plan

if TYPE_CHECKING:
    from qwenfit.engine.llm import LLM
    from qwenfit.engine.output import Delta, Stats

HELP = """\
/set [NAME VALUE]   show or change a sampling parameter (temperature, top_p, max_tokens, ...)
/system [TEXT]      show or change the system message; /system default takes the model's own again
/stats              speed of the last answer, and memory against the plan
/regen              answer the last question again
/clear              forget the conversation
/save FILE, /load FILE
/bye                leave (also Ctrl-D)
\"\"\" begins and ends a text of several lines; Ctrl-C stops an answer."""

Write = Callable[[str], None]


@dataclass
class Conversation:
    """What is said so far, and how answers are made. `stats` and `finish_reason` are the last answer's."""

    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    sampling: dict[str, Any] = field(default_factory=dict)
    stats: Stats | None = None
    finish_reason: str | None = None

    def prompt(self, start: int = 0) -> list[dict[str, str]]:
        """The messages from `start` on, after the system message."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return head + self.messages[start:]


def answer(llm: LLM, talk: Conversation, write: Write) -> bool:
    """Stream one answer to the last message into the conversation; False when Ctrl-C cut it short."""
    stream = _ask(llm, talk, write)
    text, whole = "", True
    talk.stats, talk.finish_reason = None, "abort"  # until it has ended: /stats never shows those of another answer
    try:
        for delta in stream:
            text += delta.text
            write(delta.text)
            if delta.finish_reason is not None:
                talk.stats, talk.finish_reason = delta.stats, delta.finish_reason
                if delta.error:
                    raise QwenfitError(delta.error)
    except KeyboardInterrupt:
        whole = False
        stream.close()  # type: ignore[attr-defined]
    talk.messages.append({"role": "assistant", "content": text})
    return whole


def _ask(llm: LLM, talk: Conversation, write: Write) -> Iterator[Delta]:
    """The answer's deltas. What no longer fits into the context is left out, oldest turns first, and that is said."""
    questions = [i for i, message in enumerate(talk.messages) if message["role"] == "user"]
    for start in (0, *questions):
        try:
            stream: Iterator[Delta] = llm.chat(talk.prompt(start), stream=True, **talk.sampling)
        except DoesNotFit:
            if not questions or start == questions[-1]:
                raise
        else:
            if start:
                write(f"(the context is full: without the first {start} of {len(talk.messages)} messages)\n")
            return stream
    raise AssertionError("the last question was tried")


def converse(llm: LLM, made: Plan, talk: Conversation, read: Callable[[str], str], write: Write) -> None:
    """The loop: read a message or a command, answer it, until /bye or the end of the input."""
    write(f"{made.model.name} in {made.precision}, {llm.max_model_len:,} tokens of context. /? for help.\n")
    while True:
        try:
            text = _read_message(read)
            if not text.strip():
                continue
            if not text.startswith("/"):
                talk.messages.append({"role": "user", "content": text})
                _say(llm, talk, write)
            elif not command(text, llm, made, talk, write):
                return
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:  # wherever it strikes: only /bye and the end of the input leave
            write("\n(/bye or Ctrl-D leaves)\n")
            _drop_unanswered(talk)
        except QwenfitError as error:
            write(f"error: {error.message}" + (f" ({error.hint})" if error.hint else "") + "\n")
            _drop_unanswered(talk)


def _drop_unanswered(talk: Conversation) -> None:
    """The next question stands alone."""
    if talk.messages and talk.messages[-1]["role"] == "user":
        talk.messages.pop()


def _say(llm: LLM, talk: Conversation, write: Write) -> None:
    if not answer(llm, talk, write):
        write(" (stopped)")
    write("\n")


def _read_message(read: Callable[[str], str]) -> str:
    line = read("> ")
    if not line.lstrip().startswith('"""'):
        return line
    lines = [line.lstrip()[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        lines.append(read("... "))
    lines[-1] = lines[-1].rstrip()[:-3]
    return "\n".join(lines).strip("\n")


def command(text: str, llm: LLM, made: Plan, talk: Conversation, write: Write) -> bool:
    """Do one slash command; False to leave. Raises UsageError for an unknown one."""
    name, _, rest = text[1:].partition(" ")
    rest = rest.strip()
    if name in ("bye", "exit", "quit"):
        return False
    if name in ("?", "help"):
        write(HELP + "\n")
    elif name == "set":
        write(_set(rest, llm, talk) + "\n")
    elif name == "system":
        talk.system = None if rest == "default" else rest or talk.system
        write(f"system: {talk.system or 'the default of the model'}\n")
    elif name == "stats":
        write(stats_text(llm, made, talk) + "\n")
    elif name == "regen":
        _regenerate(llm, talk, write)
    elif name == "clear":
        talk.messages.clear()
    elif name == "save":
        write(save(talk, rest) + "\n")
    elif name == "load":
        write(load(talk, rest) + "\n")
    else:
        known = ["set", "system", "stats", "regen", "clear", "save", "load", "bye", "help"]
        raise UsageError(f"There is no command /{name}.", f"Did you mean /{(nearest(name, known) or ['?'])[0]}?")
    return True


def _set(rest: str, llm: LLM, talk: Conversation) -> str:
    name, _, value = rest.partition(" ")
    if not value:  # one of them, or all
        params = replace(llm.default_params, **talk.sampling)
        names = [f.name for f in fields(params)]
        if name and name not in names:
            check_sampling({name: None})
        return "\n".join(f"{n} = {getattr(params, n)!r}" for n in ([name] if name else names))
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    check_sampling({**talk.sampling, name: parsed})
    talk.sampling[name] = parsed
    return f"{name} = {parsed!r}"


def _regenerate(llm: LLM, talk: Conversation, write: Write) -> None:
    if talk.messages and talk.messages[-1]["role"] == "assistant":
        talk.messages.pop()
    if not talk.messages:
        raise UsageError("There is no question to answer again.")
    _say(llm, talk, write)


def stats_text(llm: LLM, made: Plan, talk: Conversation) -> str:
    """Speed of the last answer beside the plan's, and the process's memory beside the plan's."""
    from qwenfit.bench.memory import process_bytes

    used = process_bytes(llm.device)
    rows = [
        f"memory   {used / 1e9:.2f} GB measured, {made.memory.process / 1e9:.2f} GB planned "
        f"({100 * (used / made.memory.process - 1):+.1f} %)"
    ]
    stats = talk.stats
    if stats is not None:
        speed = made.speed.tokens_per_s_per_request or made.speed.tokens_per_s
        rows = [
            f"prompt   {stats.prompt_tokens} tokens, {stats.cached_tokens} of them from the prefix cache",
            f"first    {1000 * stats.time_to_first_token:.0f} ms to the first token",
            f"decode   {stats.decode_tokens_per_s:.1f} tokens/s over {stats.completion_tokens}, {speed:.1f} planned",
            *rows,
        ]
    return "\n".join(rows)


def answer_figures(llm: LLM, made: Plan, talk: Conversation) -> dict[str, Any]:
    """The last answer and its figures, for --json: seconds, tokens/s, bytes."""
    from qwenfit.bench.memory import process_bytes

    figures: dict[str, Any] = {"text": talk.messages[-1]["content"], "finish_reason": talk.finish_reason}
    if (stats := talk.stats) is not None:
        figures |= {
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.completion_tokens,
            "time_to_first_token_s": stats.time_to_first_token,
            "decode_tokens_per_s": stats.decode_tokens_per_s,
        }
    return figures | {"memory_bytes": process_bytes(llm.device), "planned_memory_bytes": made.memory.process}


def save(talk: Conversation, name: str) -> str:
    """Write the conversation as JSON."""
    if not name:
        raise UsageError("/save needs a file name.")
    content = {"system": talk.system, "messages": talk.messages, "sampling": talk.sampling}
    try:
        Path(name).expanduser().write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    except OSError as error:
        raise NotFound(f"{name} cannot be written: {error.strerror}.") from error
    return f"saved {len(talk.messages)} messages to {name}"


def load(talk: Conversation, name: str) -> str:
    """Read a conversation that `save` wrote."""
    if not name:
        raise UsageError("/load needs a file name.")
    try:
        content = json.loads(Path(name).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise NotFound(f"{name} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise BadFile(f"{name} is not a saved conversation.") from error
    messages = content.get("messages") if isinstance(content, dict) else None
    if not isinstance(messages, list) or not all(_is_message(m) for m in messages):
        raise BadFile(f"{name} is not a saved conversation.")
    system, sampling = content.get("system"), content.get("sampling") or {}
    if not isinstance(system, str | None) or not isinstance(sampling, dict):
        raise BadFile(f"{name} is not a saved conversation.")
    try:
        check_sampling(sampling)
    except UsageError as error:
        raise BadFile(f"{name} is not a saved conversation: {error.message}") from error
    talk.system, talk.messages, talk.sampling = system, messages, sampling
    return f"loaded {len(messages)} messages from {name}"


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"role", "content"}
        and all(isinstance(v, str) for v in value.values())
        and value["role"] in ("system", "user", "assistant")
    )


def check_sampling(sampling: dict[str, Any]) -> None:
    """Raise UsageError for a sampling parameter that does not exist, a value out of its range, or several answers."""
    from qwenfit.engine.params import SamplingParams

    names = [f.name for f in fields(SamplingParams)]
    for name in sampling:
        if name not in names:
            near = nearest(name, names) or names
            raise UsageError(f"There is no sampling parameter {name!r}.", f"Did you mean {', '.join(near)}?")
    if SamplingParams(**sampling).n > 1:
        raise UsageError("A chat has one answer at a time: n is 1 there.", "qwenfit generate gives several")


def one_shot(llm: LLM, talk: Conversation, prompt: str, write: Write) -> bool:
    """Answer one prompt; False when it was interrupted."""
    talk.messages.append({"role": "user", "content": prompt})
    whole = answer(llm, talk, write)
    write("\n")
    return whole


def terminal_reader() -> Callable[[str], str]:
    """`input` with line editing where Python has it."""
    import importlib.util

    if importlib.util.find_spec("readline") is not None:
        import readline  # noqa: F401
    return input


def write_now(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
