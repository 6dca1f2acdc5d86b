"""Which requests run in the next step, how many tokens of each, and in which blocks."""

from __future__ import annotations

from collections import deque
from operator import attrgetter

from qwenfit.engine.block_pool import BlockPool, block_hash
from qwenfit.engine.request import Request


class Scheduler:
    """First come, first served, within `max_num_seqs` requests and `max_batched_tokens` tokens a step.

    One token for every request that is decoding comes first, the longest ahead, then the prompts already begun, then
    new ones; a prompt longer than what is left of the step goes on in the next. A request is let in when there are
    blocks for all it has so far, so only decoding can run out; then the request let in last gives its blocks back and
    waits, to be computed again. The first one is never stopped, so there is always progress.

    Tokens that are still on the device count, but a request that has all it may have with them waits for them.
    """

    def __init__(self, pool: BlockPool, max_num_seqs: int, max_batched_tokens: int, prefix_cache: bool) -> None:
        self.pool = pool
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.prefix_cache = prefix_cache
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order in which they were let in
        self.num_preemptions = 0
        self._rows = list(range(max_num_seqs - 1, -1, -1))

    def schedule(self) -> list[Request]:
        """The requests of the next step, each with its `scheduled` tokens; their blocks are reserved."""
        batch: list[Request] = []
        preemptions = self.num_preemptions
        size = self.pool.block_size
        for request in self.running.copy():  # written for speed: hundreds of them, each step
            length = request.length
            if length - request.computed != 1 or length >= request.max_length or not request.running:
                continue
            if request.computed < len(request.blocks) * size or self._reserve(request):
                request.scheduled = 1
                batch.append(request)
        # The longest first: attention hands them out one by one, and none is begun when the others are done.
        batch.sort(key=attrgetter("computed"), reverse=True)
        budget = self.max_batched_tokens - len(batch)
        if len(batch) < len(self.running):
            for request in self.running:
                budget -= self._schedule_prompt(request, budget, batch)
        if preemptions == self.num_preemptions:
            while self.waiting and budget > 0 and len(self.running) < self.max_num_seqs and self._admit():
                budget -= self._schedule_prompt(self.running[-1], budget, batch)
        return batch

    def launched(self, batch: list[Request]) -> None:
        """Whatever the device does next finds the step's keys and values in the cache."""
        for request in batch:
            request.computed += request.scheduled
            request.scheduled = 0

    def undo(self, batch: list[Request]) -> None:
        """The step did not happen; the blocks stay reserved for its repetition."""
        for request in batch:
            request.scheduled = 0

    def release_siblings(self, request: Request) -> None:
        """Queue the other answers to a prompt next, now that they find it in the prefix cache."""
        if request.siblings:
            self.waiting.extendleft(reversed(request.siblings))
            request.siblings = []

    def publish(self, request: Request) -> None:
        """Let others share the blocks that `tokens` fill. Only after finite logits: a NaN must not be passed on."""
        full = len(request.tokens) // self.pool.block_size
        if full > request.shared_blocks and self.prefix_cache and request.running:
            self._hash_blocks(request, full)
            for i in range(request.shared_blocks, full):
                self.pool.publish(request.blocks[i], request.block_hashes[i])
            request.shared_blocks = full

    def remove(self, request: Request) -> None:
        """The request has ended, wherever it was."""
        request.ended = True
        if request.running:
            self.running.remove(request)
            self._give_back(request)
        else:
            self.waiting.remove(request)

    def _schedule_prompt(self, request: Request, budget: int, batch: list[Request]) -> int:
        """Add as much of what is not computed as `budget` allows; returns the tokens added."""
        count = min(request.length - request.computed, budget)
        if request.scheduled or count <= 0 or not self._grows(request):
            return 0
        request.scheduled = count
        batch.append(request)
        return count

    @staticmethod
    def _grows(request: Request) -> bool:
        return request.running and request.length < request.max_length

    def _reserve(self, request: Request) -> bool:
        """A block for the next token, if need be from the request let in last; False if that was this one."""
        while request.computed == len(request.blocks) * self.pool.block_size:
            if self.pool.num_free:
                request.blocks += self.pool.take(1)
                break
            if self._preempt() is request:
                return False
        return True

    def _preempt(self) -> Request:
        request = self.running.pop()
        self._give_back(request)
        request.stats.preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)
        return request

    def _admit(self) -> bool:
        """Move the first waiting request to running if its blocks are there. At least one token stays to compute."""
        request = self.waiting[0]
        if request.pending:  # stopped while its last token was under way
            return False
        pool, length = self.pool, len(request.tokens)
        cached: list[int] = []
        if self.prefix_cache:
            full = (length - 1) // pool.block_size
            self._hash_blocks(request, full)
            cached = pool.find(request.block_hashes[:full])
        need = -(-length // pool.block_size) - len(cached)
        # A block to grow into for everyone who runs, lest the next step preempts what this one lets in.
        if need + len(self.running) > pool.num_free_without(cached):
            return False
        pool.hold(cached)
        request.blocks = cached + pool.take(need)
        request.shared_blocks = len(cached)
        request.computed = len(cached) * pool.block_size
        if request.stats.preemptions == 0:
            request.stats.cached_tokens = request.computed
        request.row = self._rows.pop()
        request.blocks_in_table, request.in_penalties = 0, False
        request.running = True
        self.running.append(self.waiting.popleft())
        return True

    def _give_back(self, request: Request) -> None:
        self.pool.release(request.blocks)
        self._rows.append(request.row)
        request.blocks = []
        request.running = False

    def _hash_blocks(self, request: Request, count: int) -> None:
        hashes, size = request.block_hashes, self.pool.block_size
        while len(hashes) < count:
            at = len(hashes) * size
            parent = hashes[-1] if hashes else request.prefix_root
            hashes.append(block_hash(parent, request.tokens[at : at + size]))
