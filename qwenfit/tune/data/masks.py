"""Conversations as token ids with labels: which tokens are trained.

qwen1           exactly what the official Qwen-1 script trains (finetune.py, `preprocess`), also <|im_start|> and the
                line ends of every turn; but text that looks like a special token stays text
assistant_only  what the model itself will have to write: the assistants' words and the token that ends them
all             every token
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from qwenfit.chat import chatml
from qwenfit.checkpoint.tokenizer import Tokenizer
from qwenfit.errors import UsageError
from qwenfit.tune.batch import IGNORE

Message = dict[str, Any]
Place = tuple[int, int]  # (number of a piece, character in it)


class Labelled(NamedTuple):
    ids: list[int]
    labels: list[int]  # the id where it is trained, IGNORE elsewhere


class Encoded(NamedTuple):
    """One conversation. `unused_turns` at its start or end add nothing to any loss, so the samples lack them."""

    samples: list[Labelled]
    unused_turns: int


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Message], mask: str
) -> Encoded:
    """Checked messages as one or more samples. Raises UsageError when the mask or the template cannot take them.

    By the model's chat template; as ChatML where it has none, and for `qwen1` always.
    """
    if mask != "assistant_only" and any(m.get("weight", 1) == 0 for m in messages):
        raise UsageError("A message has a weight of 0, which only the mask assistant_only heeds.")
    if mask == "all":
        ids = tokenizer.apply_chat_template(messages, list(tools) or None, add_generation_prompt=False)
        return Encoded([Labelled(ids, ids)], 0)
    if mask == "qwen1" or tokenizer.chat_template is None:
        if tools:
            raise UsageError("ChatML without a template cannot describe tools.")
        return (_qwen1 if mask == "qwen1" else _chatml_assistants)(tokenizer, messages)
    return _template_assistants(tokenizer, messages, tools)


def _qwen1(tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
    system, turns = _with_system(messages)
    skipped = 1 if turns and turns[0]["role"] != "user" else 0  # as the script has it
    ids: list[int] = []
    labels: list[int] = []
    line_end = tokenizer.encode("\n")
    for message in [system, *turns[skipped:]]:
        turn = chatml.encode_turn(tokenizer, message["role"], _content(message))
        body = len(tokenizer.encode(message["role"])) + len(line_end)
        learned = turn[1 + body : -1] if message["role"] == "assistant" else [IGNORE] * (len(turn) - body - 2)
        ids += turn + line_end
        labels += [turn[0], *[IGNORE] * body, *learned, turn[-1], *line_end]
    return Encoded([Labelled(ids, labels)], skipped)


def _chatml_assistants(tokenizer: Tokenizer, messages: Sequence[Message]) -> Encoded:
    system, turns = _with_system(messages)
    last = _last_trained(turns)
    ids: list[int] = []
    labels: list[int] = []
    line_end = tokenizer.encode("\n")
    for message in [system, *turns[: last + 1]]:
        turn = chatml.encode_turn(tokenizer, message["role"], _content(message))
        opening = 1 + len(tokenizer.encode(message["role"])) + len(line_end)
        learned = turn[opening:] if _trained(message) else [IGNORE] * (len(turn) - opening)
        ids += turn + line_end
        labels += [IGNORE] * opening + learned + [IGNORE] * len(line_end)
    return Encoded([Labelled(ids, labels)], len(turns) - 1 - last)


def _with_system(messages: Sequence[Message]) -> tuple[Message, Sequence[Message]]:
    if messages[0]["role"] == "system":
        return messages[0], messages[1:]
    return {"role": "system", "content": chatml.DEFAULT_SYSTEM}, messages


def _content(message: Message) -> str:
    if message["role"] == "tool" or message.get("tool_calls"):
        raise UsageError("ChatML without a template has no form for tool calls or their results.")
    content: str = message["content"]
    return content


def _trained(message: Message) -> bool:
    return bool(message["role"] == "assistant" and message.get("weight", 1))


def _last_trained(messages: Sequence[Message]) -> int:
    last = max((i for i, message in enumerate(messages) if _trained(message)), default=None)
    if last is None:
        raise UsageError("No turn of an assistant is there to be trained.")
    return last


class _Answer(NamedTuple):
    """One assistant's turn in the rendering of the conversation up to it."""

    pieces: list[str]  # [text, special token, text, ..., text]
    start: Place  # where the generation prompt ends
    end: Place  # after the token that ends the turn


def _template_assistants(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Message]) -> Encoded:
    """What each answer is trained on is what the model sees when it writes it: the prompt of the turns before.

    A template may write earlier turns differently from how they were written (Qwen3 leaves out their thinking). Answers
    that stand unchanged in the rendering up to a later one share its sample; others get one of their own.
    """
    last = _last_trained(messages)
    samples: list[Labelled] = []
    pieces: list[str] = []
    spans: list[tuple[Place, Place]] = []
    for index, message in enumerate(messages[: last + 1]):
        if not _trained(message):
            continue
        answer = _answer(tokenizer, messages, tools, index)
        if spans and not _same_until(pieces, answer.pieces, spans[-1][1]):
            samples.append(_label(tokenizer, pieces, spans))
            spans = []
        pieces = answer.pieces
        spans.append((answer.start, answer.end))
    samples.append(_label(tokenizer, pieces, spans))
    return Encoded(samples, len(messages) - 1 - last)


def _answer(tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Message], index: int) -> _Answer:
    template = tokenizer.chat_template
    assert template is not None
    if index == 0:
        raise UsageError("The conversation begins with an assistant's turn, which answers nothing.")
    given = list(tools) or None
    pieces = template.render(messages[: index + 1], given, add_generation_prompt=False)
    prompts = [template.render(messages[:index], given, add_generation_prompt=True)]
    if "enable_thinking" in template.source:  # an empty thought is then part of the prompt, not of what is learned
        prompts.append(template.render(messages[:index], given, add_generation_prompt=True, enable_thinking=False))
    starts = [(len(p) - 1, len(p[-1])) for p in prompts if _same_until(p, pieces, (len(p) - 1, len(p[-1])))]
    if not starts:
        raise UsageError(
            f"The chat template writes message {index} otherwise than it prompts for it, so it cannot be told apart.",
            "--mask all trains every token.",
        )
    start = max(starts)
    control = {text for text, i in tokenizer.special_tokens.items() if i in tokenizer.special_ids}
    ends = (i for i in range(start[0] + 1, len(pieces), 2) if pieces[i] in control)
    stop = next(ends, None)
    return _Answer(pieces, start, (len(pieces) - 1, len(pieces[-1])) if stop is None else (stop + 1, 0))


def _same_until(pieces: list[str], others: list[str], place: Place) -> bool:
    """Whether two renderings agree up to `place` of the first."""
    piece, offset = place
    agree = len(others) > piece and pieces[:piece] == others[:piece]
    return agree and others[piece].startswith(pieces[piece][:offset])


def _label(tokenizer: Tokenizer, pieces: list[str], spans: Sequence[tuple[Place, Place]]) -> Labelled:
    """Tokens of a rendering up to the end of the last span. Text is encoded up to a span's start on its own.

    So the ids before an answer are those of its prompt, whatever it begins with.
    """
    ids: list[int] = []
    labels: list[int] = []
    places = sorted(place for span in spans for place in span)
    for number in range(places[-1][0] + 1):
        if number % 2:
            runs = [((number, 0), [tokenizer.special_tokens[pieces[number]]])]
        else:
            here = {offset for piece, offset in places if piece == number} | {0}
            final = len(pieces[number]) if number < places[-1][0] else places[-1][1]
            cuts = pairwise(sorted(here | {final}))
            runs = [((number, a), tokenizer.encode(pieces[number][a:b])) for a, b in cuts]
        for place, tokens in runs:
            ids += tokens
            labels += tokens if any(start <= place < end for start, end in spans) else [IGNORE] * len(tokens)
    return Labelled(ids, labels)
