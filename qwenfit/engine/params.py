"""SamplingParams: how one request's tokens are chosen and when it ends. Checked once, when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qwenfit.errors import UsageError

# Bounds on what one request may ask for, the same for every way in (Python, command line, HTTP).
MAX_N = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_STOP_TOKENS = 128
MAX_BIASED_TOKENS = 1024


@dataclass(frozen=True)
class SamplingParams:
    """One request's choices. Raises UsageError where a value is out of its range.

    The raw logits are changed in this order, that of transformers (and of vLLM but for `min_p`, which it applies
    before `top_k`): logit_bias, repetition_penalty, frequency_penalty, presence_penalty, min_tokens, temperature,
    top_k, top_p, min_p.
    """

    max_tokens: int | None = None  # None: as far as the context allows
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0  # the fewest most likely tokens with at least this mass
    top_k: int = 0  # the k most likely tokens; 0: all
    min_p: float = 0.0  # only tokens at least this fraction as likely as the likeliest
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens in prompt or answer
    presence_penalty: float = 0.0  # subtracted once for every token in the answer
    frequency_penalty: float = 0.0  # subtracted for every time a token is in the answer
    logit_bias: Mapping[int, float] | None = None  # token id -> added to its logit
    stop: str | Sequence[str] = ()  # the answer ends before the first of these
    stop_token_ids: Sequence[int] = ()  # the answer ends with one of these
    seed: int | None = None  # same seed, same draws, whatever else is in the batch (a GPU may round otherwise)
    n: int = 1  # answers to one prompt
    logprobs: int | None = None  # log-probability of each chosen token, and of this many likeliest ones
    min_tokens: int = 0  # no stop before this many
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _integer("n", self.n, 1, MAX_N)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1, 2**31)
        _integer("min_tokens", self.min_tokens, 0, 2**31 if self.max_tokens is None else self.max_tokens)
        _real("temperature", self.temperature, 0.0, 100.0)
        _real("top_p", self.top_p, 0.0, 1.0, open_below=True)
        _integer("top_k", self.top_k, 0, 2**31)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("repetition_penalty", self.repetition_penalty, 0.01, 10.0)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise UsageError(f"ignore_eos is true or false, not {self.ignore_eos!r:.80}.")
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        object.__setattr__(self, "stop_token_ids", _stop_tokens(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))

    @property
    def greedy(self) -> bool:
        """Temperature 0, or so near to it that float32 could not tell."""
        return self.temperature < 1e-5

    @property
    def penalised(self) -> bool:
        return bool(self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty)


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} is a whole number, not {value!r:.80}.")
    if not low <= value <= high:
        raise UsageError(f"{name} lies between {low} and {high}; {_short(value)} does not.")


def _real(name: str, value: object, low: float, high: float, open_below: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"{name} is a number, not {value!r:.80}.")
    if not low <= value <= high or (isinstance(value, float) and math.isnan(value)) or (open_below and value == low):
        between = f"above {low:g} and at most {high:g}" if open_below else f"between {low:g} and {high:g}"
        raise UsageError(f"{name} lies {between}; {_short(value)} does not.")


def _short(value: int | float) -> str:
    """A number that fits a message: Python refuses to print an int of more than 4300 digits."""
    return f"{value:g}" if isinstance(value, float) else str(value) if abs(value) < 10**20 else "a huge number"


def _stop_strings(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) for s in strings):
        raise UsageError("stop is a string or a list of strings.")
    if len(strings) > MAX_STOP_STRINGS:
        raise UsageError(f"At most {MAX_STOP_STRINGS} stop strings are possible; {len(strings)} were given.")
    if not all(0 < len(s) <= MAX_STOP_CHARACTERS for s in strings):
        raise UsageError(f"A stop string has 1 to {MAX_STOP_CHARACTERS} characters.")
    return tuple(strings)


def _stop_tokens(ids: object) -> tuple[int, ...]:
    if isinstance(ids, str) or not isinstance(ids, Sequence) or len(ids) > MAX_STOP_TOKENS:
        raise UsageError(f"stop_token_ids is a list of at most {MAX_STOP_TOKENS} token ids.")
    for token in ids:
        _integer("A stop token id", token, 0, 2**31)
    return tuple(ids)


def _bias(bias: object) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping) or len(bias) > MAX_BIASED_TOKENS:
        raise UsageError(f"logit_bias maps at most {MAX_BIASED_TOKENS} token ids to a number from -100 to 100.")
    for token, value in bias.items():
        _integer("A token id in logit_bias", token, 0, 2**31)
        _real("A logit_bias", value, -100.0, 100.0)
    return {token: float(value) for token, value in bias.items()} or None
