"""Chat messages as callers send them, checked once before anything is built from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from qwenfit.checkpoint.bounded import shown
from qwenfit.errors import UsageError

ROLES = ("system", "user", "assistant", "tool")


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A copy of `messages` in which every content is a string. Raises UsageError for anything else.

    A list of text parts (OpenAI's form) is joined with line ends, as vLLM does for templates that take strings. The
    content may be missing only where an assistant calls tools; it is then the empty string. A call's arguments, JSON
    text in OpenAI's form, become the object that templates expect.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise UsageError("Messages are a list of at least one {role, content}.")
    return [_plain(message, f"Message {i}") for i, message in enumerate(messages)]


def _plain(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UsageError(f"{where} is not an object with role and content.")
    role = message.get("role")
    if role not in ROLES:
        raise UsageError(f"{where} has the role {shown(role)}; known are {', '.join(ROLES)}.")
    content = message.get("content")
    if isinstance(content, list):
        content = "\n".join(_part_text(part, where) for part in content)
    if content is None and role == "assistant" and message.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise UsageError(f"{where} has no text content.")
    plain = {**message, "content": content}
    if message.get("tool_calls") is not None:
        plain["tool_calls"] = _plain_calls(message["tool_calls"], where)
    return plain


def _plain_calls(calls: object, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise UsageError(f"{where} has tool_calls that are not a list of objects.")
    plain = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UsageError(f"{where} has a tool call without a function name.")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed_arguments(arguments, where)
        function = {**function, "arguments": arguments}
        plain.append({**call, "function": function} if "function" in call else function)
    return plain


def _parsed_arguments(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UsageError(f"{where} has a tool call whose arguments are not a JSON object.")
    return value


def _part_text(part: object, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
        kind = part.get("type") if isinstance(part, Mapping) else part
        raise UsageError(f"{where} has a part of type {shown(kind)}; these models read text only.")
    text: str = part["text"]
    return text
