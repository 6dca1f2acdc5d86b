"""Blocks of the KV cache that wait in the host's memory, so that what a stopped request has is not computed again.

A copy to the host takes a third of the time of computing the same tokens, and the device goes on meanwhile. On their
way out blocks are gathered beside each other on the device, after which they may be used again, and copied from there;
on their way back they are copied to the device and put into blocks that nobody uses yet.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from qwenfit.engine.copies import tensor_of
from qwenfit.engine.host_memory import HostMemory

_STAGED = 32 << 20  # bytes of the device for each of three copies under way; a 256th of the cache if that is less
_BACK = 512 << 20  # bytes that come back in a step: ten milliseconds
_MOST_BACK = 256  # blocks that do: each costs the host ten microseconds
Pair = tuple[int, int]


class Blocks(Protocol):
    """What is moved, as `qwenfit.model.kv_cache.KVCache` has it."""

    num_blocks: int

    @property
    def by_block(self) -> list[Tensor]:
        """Views whose first dimension is the blocks."""
        ...


class HostCache:
    """Slots of `nbytes` of the host's memory, each for a block of `cache`; pinned where that is on a GPU.

    The memory is taken as `keep_free` asks for it. A request takes its slots before its blocks are moved to them.
    """

    def __init__(self, cache: Blocks, nbytes: int) -> None:
        self._views = cache.by_block
        self._device = self._views[0].device
        block_bytes = sum(view[0].nbytes for view in self._views)
        self.at_once = max(1, min(_STAGED // block_bytes, cache.num_blocks // 256))  # blocks of a copy
        self.back_at_once = max(1, min(_BACK // block_bytes, _MOST_BACK))  # blocks in a step, beside which they come
        self.num_moved = 0  # blocks, either way
        gpu = self._device if self._device.type == "cuda" else None
        self.memory = HostMemory([(view.shape[1:], view.dtype) for view in self._views], nbytes, gpu)
        weakref.finalize(self, self.memory.close)
        self._ways: _Ways | None = None  # None: the cache is the host's own
        if gpu is not None and self.memory.most:
            self._ways = _Ways(self._views, self.at_once)

    def keep_free(self, count: int) -> None:
        """See `HostMemory.keep_free`."""
        self.memory.keep_free(count)

    def take(self, count: int) -> list[int] | None:
        """See `HostMemory.take`."""
        return self.memory.take(count)

    def release(self, slots: list[int]) -> None:
        """See `HostMemory.release`."""
        self.memory.release(slots)

    @torch.inference_mode()
    def move(self, out: Sequence[Pair], back: Sequence[Pair]) -> None:
        """Copy blocks to slots, (block, slot) each, and then slots to blocks, (slot, block).

        What the device does next finds the blocks read, and what it does after the next call the others written.
        """
        self.num_moved += len(out) + len(back)
        if self._ways is not None:
            self._move_beside(out, back, self._ways)
            return
        for block, slot in out:
            for view, part in zip(self._views, self.memory.at(slot), strict=True):
                part.copy_(view[block])
        for slot, block in back:
            for view, part in zip(self._views, self.memory.at(slot), strict=True):
                view[block].copy_(part)

    def _move_beside(self, out: Sequence[Pair], back: Sequence[Pair], ways: _Ways) -> None:
        here = torch.cuda.current_stream(self._device)
        if ways.coming:
            here.wait_stream(ways.back)  # for what came back beside the step before
        for pairs in _parts(out, self.at_once):
            self._move_out(pairs, ways, here)
        ways.coming = bool(back)
        if back:
            ways.back.wait_stream(ways.out)
            ways.back.wait_stream(here)  # the steps under way may still use the blocks
            with torch.cuda.stream(ways.back):
                for pairs in _parts(back, self.at_once):
                    self._move_back(pairs, ways.stage_back)

    def _move_out(self, pairs: Sequence[Pair], ways: _Ways, here: torch.cuda.Stream) -> None:
        ways.stages_out.rotate()
        stage = ways.stages_out[0]
        here.wait_event(stage.free)
        blocks = stage.numbers([block for block, _ in pairs])
        for view, staged in zip(self._views, stage.parts, strict=True):
            torch.index_select(view, 0, blocks, out=staged[: len(pairs)])
        ways.out.wait_stream(here)
        with torch.cuda.stream(ways.out):
            for i, (_, slot) in enumerate(pairs):
                for staged, part in zip(stage.parts, self.memory.at(slot), strict=True):
                    part.copy_(staged[i], non_blocking=True)
        stage.free.record(ways.out)

    def _move_back(self, pairs: Sequence[Pair], stage: _Stage) -> None:
        for i, (slot, _) in enumerate(pairs):
            for staged, part in zip(stage.parts, self.memory.at(slot), strict=True):
                staged[i].copy_(part, non_blocking=True)
        blocks = stage.numbers([block for _, block in pairs])
        for view, staged in zip(self._views, stage.parts, strict=True):
            view.index_copy_(0, blocks, staged[: len(pairs)])


class _Ways:
    """Streams for the copies out and back, and memory on the device for those under way."""

    def __init__(self, views: list[Tensor], at_once: int) -> None:
        self.out = torch.cuda.Stream(views[0].device)  # type: ignore[no-untyped-call]
        self.back = torch.cuda.Stream(views[0].device)  # type: ignore[no-untyped-call]
        self.stages_out = deque(_Stage(views, at_once) for _ in range(2))
        self.stage_back = _Stage(views, at_once)
        self.coming = False  # whether something comes back beside the last step


class _Stage:
    """Memory on the device for some blocks on their way, and when it is free again."""

    def __init__(self, views: list[Tensor], count: int) -> None:
        device = views[0].device
        self.parts = [torch.empty(count, *view.shape[1:], dtype=view.dtype, device=device) for view in views]
        self.free = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._numbers = torch.empty(count, dtype=torch.int64, device=device)  # here, as there may be no memory later

    def numbers(self, numbers: list[int]) -> Tensor:
        """At most as many as the stage has blocks, on the device."""
        return self._numbers[: len(numbers)].copy_(tensor_of(numbers).pin_memory(), non_blocking=True)


def _parts(pairs: Sequence[Pair], count: int) -> Iterator[Sequence[Pair]]:
    return (pairs[i : i + count] for i in range(0, len(pairs), count))
