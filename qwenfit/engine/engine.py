"""The engine: many requests, one network, one cache. A step is schedule, run, sample.

On a GPU the next step is launched before the tokens of this one are read (lookahead): they stay on the device, and the
host schedules, samples and writes text while the device computes. The end of an answer is then found one step late,
and the token that was computed beyond it is dropped; the answers are the same.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

import torch

from qwenfit.config import ModelConfig
from qwenfit.engine.block_pool import BlockPool, prefix_root
from qwenfit.engine.host_cache import HostCache, Pair
from qwenfit.engine.interrupts import Interrupts
from qwenfit.engine.output import Delta, Stats, TokenLogprob
from qwenfit.engine.params import SamplingParams
from qwenfit.engine.request import Request
from qwenfit.engine.runner import Network, Runner
from qwenfit.engine.sampler import Chosen, Sampler
from qwenfit.engine.scheduler import Scheduler
from qwenfit.engine.text import TextStream
from qwenfit.errors import DoesNotFit, QwenfitError, UsageError
from qwenfit.model.kv_cache import KVCache

if TYPE_CHECKING:
    from qwenfit.checkpoint.tokenizer import Tokenizer


class QueueFull(QwenfitError):
    """As many requests wait as may wait; try again later."""


@dataclass(slots=True)
class Flight:
    """A step that has been launched and not yet read."""

    requests: list[Request]  # those that get a token from it
    chosen: Chosen | None  # None: it has only parts of prompts
    left: Iterator[tuple[Request, int, TokenLogprob | None]] | None = None  # once read: what is not handed out


def check_whole(**given: object) -> None:
    """Raise UsageError where something given is neither None nor a whole number."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Integral):  # numpy's are too
            raise UsageError(f"{name} is a whole number, and {value!r} was given.")


class Engine:
    """Add requests, then call `step` while there are any. One thread at a time; its memory does not grow, but for the
    host's that `swap_bytes` allow.

    In `interrupts.taken` Ctrl-C interrupts the network and nothing else: a step is taken again, and no token is lost.

    `max_model_len` (prompt + answer; by default the model's context) is cut to what `cache` holds. Without a tokenizer
    there is no text, no end of sequence, and every row of the head can be drawn. `lookahead` (default: on a GPU): read
    a step's tokens after the next one is launched. `swap_bytes`: of the host's memory, for what requests have computed
    that must wait for others.
    """

    def __init__(
        self,
        model: Network,
        config: ModelConfig,
        cache: KVCache,
        tokenizer: Tokenizer | None,
        *,
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_batched_tokens: int = 2048,
        max_queue: int | None = None,
        prefix_cache: bool = True,
        swap_bytes: int = 0,
        device: torch.device | str = "cpu",
        lookahead: bool | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        max_model_len = config.context_length if max_model_len is None else max_model_len
        check_whole(
            max_model_len=max_model_len, max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens,
            max_queue=max_queue, swap_bytes=swap_bytes,
        )  # fmt: skip
        if min(max_model_len, max_num_seqs) < 1:
            raise UsageError("max_model_len and max_num_seqs are at least 1.")
        if swap_bytes < 0:
            raise UsageError(f"swap_bytes is at least 0, and {swap_bytes} was given.")
        if max_batched_tokens < max_num_seqs:
            raise UsageError(f"max_batched_tokens ({max_batched_tokens}) is below max_num_seqs ({max_num_seqs}).")
        self.config = config
        self.tokenizer = tokenizer
        self.max_model_len = min(max_model_len, cache.num_blocks * cache.block_size)
        self.max_queue = max_queue
        self.vocab_size = config.vocab_size if tokenizer is None else min(tokenizer.vocab_size, config.vocab_size)
        self._eos_ids = frozenset(() if tokenizer is None else tokenizer.eos_ids)
        self._clock = clock
        device = torch.device(device)
        pool = BlockPool(cache.num_blocks, cache.block_size)
        may_run_out = cache.num_blocks < max_num_seqs * -(-self.max_model_len // cache.block_size)
        self.host = HostCache(cache, swap_bytes) if swap_bytes and may_run_out else None
        self.scheduler = Scheduler(pool, max_num_seqs, max_batched_tokens, prefix_cache, self.host)
        banned = () if tokenizer is None else tokenizer.textless_ids
        self.sampler = Sampler(self.vocab_size, max_num_seqs, self.max_model_len, device, banned)
        self.runner = Runner(
            model,
            cache,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            max_model_len=self.max_model_len,
            device=device,
            greedy=self.sampler.greedy,
        )
        if device.type == "cuda":
            self.sampler.compile(config.vocab_size)
        self._ahead = int(device.type == "cuda" if lookahead is None else lookahead)
        self._flights: deque[Flight] = deque()  # at most one between steps, two within one
        self._interrupted = False  # whether the last launch was: what the device keeps may be of that step already
        self.interrupts = Interrupts()
        self._untold: list[Delta] = []  # made, and handed out by the end of a step: an interrupted one loses none
        self._next_id = 0
        self._num_deadlines = 0

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._untold)

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raise what `add` would raise."""
        if not prompt:
            raise UsageError("The prompt is empty: there is nothing to continue.")
        if set(map(type, prompt)) != {int} or min(prompt) < 0 or max(prompt) >= self.vocab_size:
            raise UsageError(f"A prompt consists of token ids from 0 to {self.vocab_size - 1}.")
        if len(prompt) >= self.max_model_len:
            raise DoesNotFit(
                f"The prompt has {len(prompt)} tokens; with an answer at most {self.max_model_len} fit.",
                "Shorten the prompt, or give a longer --context and the memory for its KV cache.",
            )
        named = [*params.stop_token_ids, *(params.logit_bias or ())]
        if any(token >= self.vocab_size for token in named):
            raise UsageError(f"logit_bias and stop_token_ids name tokens from 0 to {self.vocab_size - 1}.")
        if params.stop and self.tokenizer is None:
            raise UsageError("Stop strings need a tokenizer, and this model was loaded without one.")
        if self.max_queue is not None and len(self.scheduler.waiting) >= self.max_queue:
            raise QueueFull(f"{len(self.scheduler.waiting)} requests are waiting, and no more may.", "Try again later.")

    def add(
        self, prompt: Sequence[int], params: SamplingParams, *, deadline: float | None = None, cache_salt: str = ""
    ) -> int:
        """Queue a prompt of token ids; returns the id that its deltas carry.

        `deadline` is in seconds from now. Only requests of the same `cache_salt` share prefixes. Raises UsageError
        (empty prompt, unknown token id), DoesNotFit (longer than the context or the cache) or QueueFull.
        """
        self.check(prompt, params)
        self._next_id += 1
        now = self._clock()
        seed = secrets.randbits(63) if params.seed is None else params.seed
        alpha = self.config.ntk_alpha(len(prompt))
        limit = self.max_model_len if params.max_tokens is None else len(prompt) + params.max_tokens
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_ids)
        answers = [
            Request(
                id=self._next_id,
                index=index,
                tokens=list(prompt),
                prompt_length=len(prompt),
                max_length=min(limit, self.max_model_len),
                params=params,
                seed=seed,
                alpha=alpha,
                stop_ids=stop_ids,
                prefix_root=prefix_root(alpha, cache_salt),
                text=TextStream(self.tokenizer.detokenizer(), tuple(params.stop)) if self.tokenizer else None,
                stats=Stats(prompt_tokens=len(prompt), arrived=now),
                deadline=None if deadline is None else now + deadline,
            )
            for index in range(params.n)
        ]
        first, *first.siblings = answers
        self.scheduler.waiting.append(first)
        self._num_deadlines += 0 if deadline is None else params.n
        return self._next_id

    def abort(self, *request_ids: int) -> None:
        """End requests now, wherever they are; their last deltas come with the next step. Unknown ids are ignored."""
        ids = set(request_ids)
        with self.interrupts.held():
            for request in self._all() if ids else ():
                if request.id in ids:
                    self._untold.append(self._end(request, "abort"))

    def step(self) -> list[Delta]:
        """Schedule, run, sample: one token more for each answer that is past its prompt; with lookahead a step late."""
        self.interrupts.tell()
        with self.interrupts.held():
            return self._step()

    def _step(self) -> list[Delta]:
        self._expire()
        while len(self._flights) > (0 if self._interrupted else self._ahead):
            self._read()
        self._interrupted = False
        batch = self.scheduler.schedule()
        if self.host is not None:
            self._move(self.host, *self.scheduler.moves())
        fits = self._launch(batch) if batch else True
        while self._flights and (len(self._flights) > self._ahead or not batch or not fits):
            self._read()
        if not fits:
            alive = [request for request in batch if not request.ended]
            self._untold += [self._end(request, "error", "The device ran out of memory.") for request in alive]
        deltas, self._untold = self._untold, []
        if not self.has_work:
            self._flights.clear()  # a step beyond the end of every answer: nobody waits for it
        return deltas

    def _move(self, host: HostCache, out: list[Pair], back: list[Pair]) -> None:
        """Make the scheduler's moves; whose fail, for want of memory, end."""
        try:
            host.move(out, back)
        except torch.OutOfMemoryError:
            for request in self.scheduler.moved(out, back):
                self._untold.append(self._end(request, "error", "The device ran out of memory."))

    def _launch(self, batch: list[Request]) -> bool:
        """Start the step; False where the device has no memory for it."""
        now = self._clock()
        for request in batch:
            if not request.stats.started:
                request.stats.started = now
        reached = [request for request in batch if request.computed + request.scheduled == request.length]
        try:
            with self.interrupts.allowed():
                logits, likeliest = self.runner.run(batch)
            chosen = None if logits is None else self.sampler.choose(logits, reached, likeliest)
            if chosen is not None and likeliest is None and self._ahead:
                self.runner.keep(reached, chosen.tokens)
        except torch.OutOfMemoryError:
            self.scheduler.undo(batch)
            return False
        except BaseException:
            self.scheduler.undo(batch)  # the next step does it again, from tokens that the host has read
            self._interrupted = True
            raise
        self.scheduler.launched(batch)
        for request in reached:
            request.pending += 1
        self._flights.append(Flight(reached, chosen))
        return True

    def _read(self) -> None:
        """Wait for the oldest step and take its tokens; answers that have ended meanwhile get none."""
        flight = self._flights[0]
        if flight.left is None:
            tokens, logprobs = flight.chosen.read() if flight.chosen is not None else ([], None)
            flight.left = zip(flight.requests, tokens, logprobs or [None] * len(tokens), strict=True)
        now = self._clock()
        for request, token, logprob in flight.left:  # goes on where it was interrupted
            request.pending -= 1
            if not request.ended:
                self._untold.append(self._accept(request, token, logprob, now))
        self._flights.popleft()

    def _all(self) -> list[Request]:
        """Every answer that has not ended."""
        known = [*self.scheduler.running, *self.scheduler.waiting]
        return known + [sibling for request in known for sibling in request.siblings]

    def _expire(self) -> None:
        if self._num_deadlines:
            now = self._clock()
            for request in self._all():
                if request.deadline is not None and request.deadline <= now:
                    self._untold.append(self._end(request, "deadline"))

    def _accept(self, request: Request, token: int, logprob: TokenLogprob | None, now: float) -> Delta:
        """Append one token to an answer and see whether that ends it."""
        if token < 0:
            return self._end(request, "error", "The model gave logits that are not finite.")
        self.scheduler.publish(request)
        if request.siblings:
            self.scheduler.release_siblings(request)
        request.tokens.append(token)
        stats, text = request.stats, request.text
        stats.completion_tokens += 1
        if not stats.first_token:
            stats.first_token = now
        delta = Delta(request.id, request.index, "", [token], None if logprob is None else [logprob])
        reason: str | None = None
        if token in request.stop_ids:
            reason, delta.stop_reason = "stop", token
        elif text is not None:
            delta.text = text.push(token, stats.completion_tokens >= request.params.min_tokens)
            if text.stopped_by is not None:
                reason = "stop"
        if reason is None and len(request.tokens) >= request.max_length:
            reason = "length"
        return delta if reason is None else self._end(request, reason, delta=delta)

    def _end(self, request: Request, reason: str, error: str | None = None, delta: Delta | None = None) -> Delta:
        """Take the answer out of the engine; its last delta also has the text that was held back."""
        self.scheduler.release_siblings(request)
        self.scheduler.remove(request)
        self._num_deadlines -= request.deadline is not None
        delta = delta or Delta(request.id, request.index, "", [], None if request.params.logprobs is None else [])
        if request.text is not None:
            delta.text += request.text.finish()
            if request.text.stopped_by is not None:
                reason, delta.stop_reason = "stop", request.text.stopped_by
        delta.finish_reason, delta.error, delta.stats = reason, error, request.stats
        request.stats.finished = self._clock()
        return delta
