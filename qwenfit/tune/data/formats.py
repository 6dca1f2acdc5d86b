"""Rows in the known formats to records: a conversation as plain messages, or a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenfit.chat.messages import plain_messages
from qwenfit.checkpoint.bounded import shown
from qwenfit.errors import BadFile, UsageError
from qwenfit.planning.task import check_choice
from qwenfit.tune.data.reading import read_rows, read_text

Message = dict[str, Any]
GUIDE_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant", "tool": "tool"}


@dataclass(frozen=True)
class Record:
    """One row: a conversation (`messages`, checked, with string contents), or a `text`."""

    source: str  # "file:line"
    messages: tuple[Message, ...] = ()
    tools: tuple[Message, ...] = ()
    text: str = ""
    ends: bool = True  # whether the document ends with this text


def read_records(path: Path, form: str | None = None) -> Iterator[Record | BadFile]:
    """The rows of a file as records, each bad one as the BadFile that names its line and says why.

    form: one of FORMATS; None: as the first row that can be read looks. Raises as `read_rows`, and UsageError for an
    unknown form or one that the file cannot have.
    """
    if form is not None:
        check_choice("format", form, tuple(FORMATS))
    if path.suffix.lower() == ".txt":
        if form not in (None, "text"):
            raise UsageError(f"{shown(path)} is text, and the format named is {form}.")
        yield from (Record(f"{path}:{line}", text=text, ends=ends) for line, text, ends in read_text(path))
        return
    for line, row in read_rows(path):
        source = f"{path}:{line}"
        if isinstance(row, BadFile):
            yield row
            continue
        try:
            form = form or detect(row)
            yield FORMATS[form](row, source)
        except UsageError as error:
            yield BadFile(f"{source}: {error.message}", error.hint)


def detect(row: dict[str, Any]) -> str:
    """The format of a row by its keys. Raises UsageError when it is none of FORMATS."""
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        turns = row["conversations"] if isinstance(row["conversations"], list) else []
        names = [turn.get("from") for turn in turns if isinstance(turn, dict)]
        return "sharegpt" if {"human", "gpt", "tool"} & {n for n in names if isinstance(n, str)} else "conversations"
    if "instruction" in row:
        return "alpaca"
    if "text" in row:
        return "text"
    raise UsageError(
        f"The keys {shown(', '.join(row))} are those of no known format.",
        "Known: conversations (the guide's and ShareGPT), messages, instruction with output (Alpaca), text.",
    )


def _messages(row: dict[str, Any], source: str) -> Record:
    """OpenAI's: messages of {role, content}, tools; a message's weight of 0 keeps it from being trained."""
    messages = plain_messages(_list_of("messages", row))
    for number, message in enumerate(messages):
        weight = message.get("weight", 1)
        if weight not in (0, 1) or (weight == 0 and message["role"] != "assistant"):
            raise UsageError(f"Message {number} has a weight of {shown(weight)}; an assistant's may be 0 or 1.")
    return Record(source, tuple(messages), _tools(row))


def _turns(row: dict[str, Any], source: str, roles: dict[str, str]) -> Record:
    """`conversations`: turns of {from, value}; `system` and `tools` beside them as ShareGPT's descendants have them."""
    messages = _system(row)
    turns = _list_of("conversations", row)
    if not turns:
        raise UsageError("The conversation is empty.")
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise UsageError(f"Turn {number} is not an object with from and value.")
        name = turn.get("from")
        if not isinstance(name, str) or name not in roles:
            raise UsageError(f"Turn {number} is from {shown(name)}; known are {', '.join(roles)}.")
        messages.append({"role": roles[name], "content": _string("value", turn, f"Turn {number}")})
    return Record(source, tuple(messages), _tools(row))


def _alpaca(row: dict[str, Any], source: str) -> Record:
    """instruction and input, a line end between them, are the user's turn; history: earlier [asked, answered] pairs."""
    messages = _system(row)
    history = _list_of("history", row) if row.get("history") is not None else []
    for number, pair in enumerate(history):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise UsageError(f"History {number} is not a pair of texts, asked and answered.")
        messages += _exchange(*pair)
    asked = [_string("instruction", row)]
    if row.get("input") not in (None, ""):
        asked.append(_string("input", row))
    return Record(source, tuple(messages + _exchange("\n".join(asked), _string("output", row))))


def _text(row: dict[str, Any], source: str) -> Record:
    text = _string("text", row)
    if not text:
        raise UsageError("The text is empty.")
    return Record(source, text=text)


FORMATS: dict[str, Callable[[dict[str, Any], str], Record]] = {
    "conversations": lambda row, source: _turns(row, source, GUIDE_ROLES),
    "messages": _messages,
    "sharegpt": lambda row, source: _turns(row, source, SHAREGPT_ROLES),
    "alpaca": _alpaca,
    "text": _text,
}


def _exchange(asked: str, answered: str) -> list[Message]:
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]


def _system(row: dict[str, Any]) -> list[Message]:
    if row.get("system") in (None, ""):
        return []
    return [{"role": "system", "content": _string("system", row)}]


def _tools(row: dict[str, Any]) -> tuple[Message, ...]:
    """Descriptions of tools, given as a list or as the JSON text of one."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools:
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise UsageError("The tools are text that is not JSON.") from None
    if not tools and (tools is None or isinstance(tools, str | list)):
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UsageError("The tools are not a list of objects.")
    return tuple(tools)


def _list_of(key: str, row: dict[str, Any]) -> list[Any]:
    value = row.get(key)
    if not isinstance(value, list):
        raise UsageError(f"{key} is {'missing' if key not in row else 'not a list'}.")
    return value


def _string(key: str, row: dict[str, Any], where: str = "The row") -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise UsageError(f"{where} has no {key}." if key not in row else f"{where}'s {key} is not text.")
    return value
