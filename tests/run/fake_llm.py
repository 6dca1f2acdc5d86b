"""A stand-in for LLM that answers each message with its upper case, a word at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from qwenfit.engine.output import Delta, Stats
from qwenfit.engine.params import SamplingParams
from qwenfit.errors import DoesNotFit


class Words:
    """A tokenizer whose tokens are whole words."""

    vocab_size = 10_000

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> list[int]:
        return self.encode(messages[-1]["content"])


@dataclass
class FakeLLM:
    device: str = "cpu"
    max_model_len: int = 512
    default_params: SamplingParams = field(default_factory=SamplingParams)
    tokenizer: Words = field(default_factory=Words)
    interrupt_after: int | None = None  # raise KeyboardInterrupt after so many deltas
    seen: list[Any] = field(default_factory=list)  # every chat's messages

    def chat(self, messages: list[dict[str, str]], *, stream: bool, **sampling: Any) -> Iterator[Delta]:
        assert stream
        if len(messages) >= self.max_model_len:  # as if each message were a token
            raise DoesNotFit("The prompt is too long.")
        self.seen.append((list(messages), sampling))
        return self._deltas(0, messages[-1]["content"].upper().split(), len(messages))

    def generate(self, prompts: list[list[int]], params: list[SamplingParams], *, stream: bool) -> Iterator[Delta]:
        assert stream
        for i in reversed(range(len(prompts))):  # they finish in another order than they came
            for index in range(params[i].n):
                words = [self.tokenizer.words[token].upper() for token in prompts[i]]
                for delta in self._deltas(i, words, len(prompts[i])):
                    delta.index = index
                    yield delta

    def _deltas(self, request_id: int, words: list[str], prompt_tokens: int) -> Iterator[Delta]:
        stats = Stats(prompt_tokens, arrived=0.0, completion_tokens=len(words), first_token=0.5, finished=1.0)
        for i, word in enumerate(words):
            if self.interrupt_after == i:
                raise KeyboardInterrupt
            last = i == len(words) - 1
            yield Delta(request_id, 0, word + " ", [i], None, "stop" if last else None, stats=stats if last else None)
