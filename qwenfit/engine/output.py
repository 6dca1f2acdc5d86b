"""What comes out of the engine: an answer's deltas step by step, and whole answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qwenfit.engine.params import SamplingParams


@dataclass(slots=True)
class Stats:
    """What one answer took. Times are seconds on the engine's clock; 0 where it has not happened."""

    prompt_tokens: int
    arrived: float
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    completion_tokens: int = 0  # a stop token counts
    preemptions: int = 0
    started: float = 0.0  # first time in a step
    first_token: float = 0.0
    finished: float = 0.0

    @property
    def queue_time(self) -> float:
        return self.started - self.arrived if self.started else 0.0

    @property
    def time_to_first_token(self) -> float:
        return self.first_token - self.arrived if self.first_token else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first, over the time from the first token to the last."""
        elapsed = self.finished - self.first_token
        return (self.completion_tokens - 1) / elapsed if self.completion_tokens > 1 and elapsed > 0 else 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """log_softmax of the raw logits (before any penalty or temperature) at one generated token."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # the likeliest tokens, best first: (id, log-probability)


@dataclass(slots=True)
class Delta:
    """What one step added to one answer. The texts of an answer's deltas, joined, are its text."""

    request_id: int
    index: int  # which of the request's n answers
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: str | None = None  # "stop" | "length" | "abort" | "deadline" | "error"; None: there is more
    stop_reason: str | int | None = None  # the stop string, or the stop token id
    error: str | None = None
    stats: Stats | None = None  # with the last delta


@dataclass(slots=True)
class Completion:
    """One whole answer."""

    index: int
    text: str
    token_ids: list[int]  # a stop token is the last of them; the text leaves it out
    logprobs: list[TokenLogprob] | None
    finish_reason: str
    stop_reason: str | int | None
    error: str | None
    stats: Stats


@dataclass(slots=True)
class RequestOutput:
    """A prompt and its n answers; `text`, `token_ids` and `finish_reason` are the first one's."""

    prompt_token_ids: list[int]
    completions: list[Completion]

    @property
    def text(self) -> str:
        return self.completions[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.completions[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.completions[0].finish_reason

    @property
    def stats(self) -> Stats:
        return self.completions[0].stats


def collect(prompts: list[list[int]], params: Sequence[SamplingParams], deltas: Iterable[Delta]) -> list[RequestOutput]:
    """Join the deltas of each answer. Only the last is kept: garbage collections would look at all of them."""
    parts: dict[tuple[int, int], tuple[list[str], list[int], list[TokenLogprob]]] = {
        (i, index): ([], [], []) for i, wanted in enumerate(params) for index in range(wanted.n)
    }
    ends: dict[tuple[int, int], Delta] = {}
    for delta in deltas:
        key = delta.request_id, delta.index
        texts, tokens, logprobs = parts[key]
        texts.append(delta.text)
        tokens += delta.token_ids
        logprobs += delta.logprobs or ()
        if delta.finish_reason is not None:
            ends[key] = delta
    outputs = [RequestOutput(prompt, []) for prompt in prompts]
    for key, (texts, tokens, logprobs) in parts.items():
        last = ends[key]
        assert last.finish_reason is not None and last.stats is not None
        completion = Completion(
            index=last.index,
            text="".join(texts),
            token_ids=tokens,
            logprobs=None if last.logprobs is None else logprobs,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            error=last.error,
            stats=last.stats,
        )
        outputs[last.request_id].completions.append(completion)
    return outputs
