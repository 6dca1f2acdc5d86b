"""Which requests run in the next step, how many tokens of each, and in which blocks."""

from __future__ import annotations

from collections import deque
from operator import attrgetter

from qwenfit.engine.block_pool import BlockPool, block_hash
from qwenfit.engine.host_cache import HostCache, Pair
from qwenfit.engine.request import Request


class Scheduler:
    """First come, first served, within `max_num_seqs` requests and `max_batched_tokens` tokens a step.

    One token for every request that is decoding comes first, the longest ahead, then the prompts already begun, then
    new ones; a prompt longer than what is left of the step goes on in the next. A request is let in when there are
    blocks for all it has so far, so only decoding can run out; then the request let in last is stopped and waits. With
    a slot in `host` for each of its blocks it gives these up as they are needed, and has them copied back before it
    goes on; else, and where others have half of them too, it gives all back at once, and is computed again. The first
    one is never stopped, so there is always progress.

    `moves` must be made before each step.

    Tokens that are still on the device count, but a request that has all it may have with them waits for them.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_num_seqs: int,
        max_batched_tokens: int,
        prefix_cache: bool,
        host: HostCache | None = None,
    ) -> None:
        self.pool = pool
        self.host = host
        self.max_num_seqs = max_num_seqs
        self.max_batched_tokens = max_batched_tokens
        self.prefix_cache = prefix_cache
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []  # in the order in which they were let in
        self.num_preemptions = 0
        self._promised = 0  # blocks that those who run have, or may come to have
        self._rows = list(range(max_num_seqs - 1, -1, -1))
        self._stopped: list[Request] = []  # those of `waiting` that still have blocks
        self._returning: list[Request] = []  # those of `running` that do not have all of theirs back
        self._out: list[Pair] = []  # what `moves` returns
        self._back: list[Pair] = []

    def schedule(self) -> list[Request]:
        """The requests of the next step, each with its `scheduled` tokens; their blocks are reserved."""
        batch: list[Request] = []
        preemptions = self.num_preemptions
        size = self.pool.block_size
        if self.host is not None and 4 * self.pool.num_free < self.pool.num_blocks < self._promised:
            self.host.keep_free(self._promised - self.pool.num_blocks)
        for request in self.running.copy():  # written for speed: hundreds of them, each step
            length = request.length
            if length - request.computed != 1 or not self._grows(request):
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
            if self.host is not None and self._returning:
                self._bring_back(self.host)
        return batch

    def moves(self) -> tuple[list[Pair], list[Pair]]:
        """What to copy before the step: from blocks to slots of `host`, and after that from slots to blocks."""
        out, back, self._out, self._back = self._out, self._back, [], []
        return out, back

    def moved(self, out: list[Pair], back: list[Pair]) -> list[Request]:
        """Whose blocks these `moves` are of."""
        slots, blocks = {slot for _, slot in out}, {block for _, block in back}
        known = [*self.running, *self.waiting]
        return [request for request in known if slots & {*request.slots} or blocks & {*request.blocks}]

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
        (self.running if request.running else self.waiting).remove(request)
        self._give_back(request)

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
        return request.running and request.length < request.max_length and request.resident == len(request.slots)

    def _reserve(self, request: Request) -> bool:
        """A block for the next token, if need be from the request let in last; False if that was this one."""
        while not self.pool.num_free:
            if not self._move_out() and self._preempt() is request:
                return False
        request.blocks += self.pool.take(1)
        return True

    def _preempt(self) -> Request:
        request = self.running.pop()
        if self.host is None or not self._keep(request, self.host):
            self._give_back(request)
        else:
            self._stop(request)
        request.stats.preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(request)
        return request

    def _keep(self, request: Request, host: HostCache) -> bool:
        """Let a request that is stopped keep what it has computed, if the host has room for that.

        But not where others have half of it too: then it finds that again, and the rest is soon computed.
        """
        if not request.slots:  # else it is stopped again before all was back
            count = -(-request.computed // self.pool.block_size)
            if 2 * sum(map(self.pool.is_shared, request.blocks)) >= count:
                return False
            slots = host.take(count)
            if not slots:
                return False
            request.slots, request.resident, request.hosted = slots, count, count
        self.pool.release(request.blocks[request.resident :])
        del request.blocks[request.resident :]
        if request.blocks:
            self._stopped.append(request)
        return True

    def _move_out(self, but: Request | None = None) -> bool:
        """Take blocks, the last ones first, from a stopped request other than `but`; False: there are none."""
        for request in self._stopped:
            if request is but:
                continue
            count = 0
            while request.blocks and self.host is not None and count < self.host.at_once:
                block, request.resident = request.blocks.pop(), request.resident - 1
                if request.resident < request.hosted:
                    request.hosted = request.resident
                    self._out.append((block, request.slots[request.resident]))
                self.pool.release([block])
                count += 1
            if count:
                if not request.blocks:
                    self._stopped.remove(request)
                return True
        return False

    def _bring_back(self, host: HostCache) -> None:
        """Go on with moving back what was moved out of those that run again; they go on with the step after."""
        for request in self._returning.copy():
            first, count = request.resident, len(request.slots)
            until = min(count, first + host.back_at_once - len(self._back))
            self._back += zip(request.slots[first:until], request.blocks[first:until], strict=True)
            request.resident = until
            if until == count:
                self._returning.remove(request)
                self._forget_slots(request)

    def _forget_slots(self, request: Request) -> None:
        if self.host is not None:
            self.host.release(request.slots)
        request.slots, request.resident, request.hosted = [], 0, 0

    def _admit(self) -> bool:
        """Move the first waiting request to running if its blocks are there. At least one token stays to compute."""
        request = self.waiting[0]
        if request.pending:  # stopped while its last token was under way
            return False
        pool, length = self.pool, len(request.tokens)
        if request.slots:
            return self._admit_kept(request)
        cached: list[int] = []
        if self.prefix_cache:
            full = (length - 1) // pool.block_size
            self._hash_blocks(request, full)
            cached = pool.find(request.block_hashes[:full])
        need = -(-length // pool.block_size) - len(cached)
        if not self._has_room(request, need, cached):
            return False
        pool.hold(cached)
        request.blocks = cached + pool.take(need)
        request.shared_blocks = len(cached)
        request.computed = len(cached) * pool.block_size
        if request.stats.preemptions == 0:
            request.stats.cached_tokens = request.computed
        self._run(request)
        return True

    def _admit_kept(self, request: Request) -> bool:
        """`_admit` for one that has kept what it has computed: in blocks, in slots, or in blocks that others have."""
        pool, have, length = self.pool, request.resident, len(request.tokens)
        known: list[int] = []
        if self.prefix_cache and have < len(request.slots):
            full = request.computed // pool.block_size
            self._hash_blocks(request, full)
            known = pool.find(request.block_hashes[:full])[have:]
        need = -(-length // pool.block_size) - have - len(known)
        if not self._has_room(request, need, known):
            return False
        pool.hold(known)
        request.blocks += known + pool.take(need)
        request.resident += len(known)
        request.shared_blocks = min(request.shared_blocks, have)
        if request in self._stopped:
            self._stopped.remove(request)
        if request.resident == len(request.slots):
            self._forget_slots(request)
        else:
            self._returning.append(request)
        self._run(request)
        return True

    def _has_room(self, request: Request, need: int, cached: list[int]) -> bool:
        """Whether it may take so many blocks beside `cached`. Where nobody runs, the stopped give theirs up for it."""
        pool = self.pool
        while not self.running and need > pool.num_free_without(cached) and self._move_out(but=request):
            pass
        # A block to grow into for everyone who runs, lest the next step preempts what this one lets in.
        return need + len(self.running) <= pool.num_free_without(cached)

    def _run(self, request: Request) -> None:
        request.row = self._rows.pop()
        request.blocks_in_table, request.in_penalties = 0, False
        request.running = True
        self.running.append(self.waiting.popleft())
        self._promised += self._most_blocks(request)

    def _stop(self, request: Request) -> None:
        request.running = False
        if request in self._returning:
            self._returning.remove(request)
        self._rows.append(request.row)
        self._promised -= self._most_blocks(request)

    def _most_blocks(self, request: Request) -> int:
        return -(-request.max_length // self.pool.block_size)

    def _give_back(self, request: Request) -> None:
        """All that the request has."""
        self.pool.release(request.blocks)
        if request.running:
            self._stop(request)
        elif request in self._stopped:
            self._stopped.remove(request)
        request.blocks = []
        self._forget_slots(request)

    def _hash_blocks(self, request: Request, count: int) -> None:
        hashes, size = request.block_hashes, self.pool.block_size
        while len(hashes) < count:
            at = len(hashes) * size
            parent = hashes[-1] if hashes else request.prefix_root
            hashes.append(block_hash(parent, request.tokens[at : at + size]))
