"""ChatML, token by token, as Qwen-1's own code builds it (qwen_generation_utils.py of the Qwen-72B release).

Role, line end and content are encoded one by one, so no content can merge with what surrounds it or become a special
token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from qwenfit.errors import UsageError

DEFAULT_SYSTEM = "You are a helpful assistant."
IM_START, IM_END = "<|im_start|>", "<|im_end|>"


class Encoder(Protocol):
    """What ChatML needs of a tokenizer."""

    def encode(self, text: str, /) -> list[int]: ...

    def special_id(self, text: str, /) -> int: ...


def encode_turn(tokenizer: Encoder, role: str, content: str) -> list[int]:
    """`<|im_start|>role\\ncontent<|im_end|>`, without a line end after it."""
    body = tokenizer.encode(role) + tokenizer.encode("\n") + tokenizer.encode(content)
    return [tokenizer.special_id(IM_START), *body, tokenizer.special_id(IM_END)]


def encode_messages(
    tokenizer: Encoder, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
) -> list[int]:
    """Checked messages (`plain_messages`) as ChatML, each turn with a line end after it.

    The default system message comes first where there is none. Raises UsageError for tool messages and tool calls,
    which ChatML has no form for.
    """
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]
    line_end = tokenizer.encode("\n")
    ids: list[int] = []
    for message in messages:
        if message["role"] == "tool" or message.get("tool_calls"):
            raise UsageError("This model has no chat template, so it cannot take tool calls or their results.")
        ids += encode_turn(tokenizer, message["role"], message["content"]) + line_end
    if add_generation_prompt:
        ids += [tokenizer.special_id(IM_START), *tokenizer.encode("assistant"), *line_end]
    return ids


def make_context(
    tokenizer: Encoder,
    query: str,
    history: Sequence[tuple[str, str]] = (),
    system: str = "",
    max_window_size: int = 6144,
) -> tuple[str, list[int]]:
    """Qwen-1's prompt for the next answer, as (text, token ids).

    history: (query, answer) turns, oldest first. They are kept from the newest back, while the system message, the kept
    turns and the next one stay below `max_window_size` tokens; the query and the opening of the answer are not counted.
    """
    line_end = tokenizer.encode("\n")
    system_ids = encode_turn(tokenizer, "system", system)
    kept_text = ""
    kept_ids: list[int] = []
    for asked, answered in reversed(history):
        turn = line_end + encode_turn(tokenizer, "user", asked)
        turn += line_end + encode_turn(tokenizer, "assistant", answered)
        if len(system_ids) + len(turn) + len(kept_ids) >= max_window_size:
            break
        kept_ids = turn + kept_ids
        kept_text = f"\n{_turn_text('user', asked)}\n{_turn_text('assistant', answered)}" + kept_text
    opening = [tokenizer.special_id(IM_START), *tokenizer.encode("assistant"), *line_end]
    ids = system_ids + kept_ids + line_end + encode_turn(tokenizer, "user", query) + line_end + opening
    text = f"{_turn_text('system', system)}{kept_text}\n{_turn_text('user', query)}\n{IM_START}assistant\n"
    return text, ids


def _turn_text(role: str, content: str) -> str:
    return f"{IM_START}{role}\n{content}{IM_END}"


def clean_reply(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of an answer as Qwen-1's decode_tokens gives it: up to the first stop token, stripped."""
    stops = set(tokenizer.eos_ids)
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    text: str = tokenizer.decode(ids[:end])
    return text.strip()
