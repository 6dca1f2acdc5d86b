"""Blocks of the KV cache that wait in the host's memory, so that what a stopped request has is not computed again.

A copy to the host takes a third of the time of computing the same tokens, and the device goes on meanwhile. On their
way out blocks are gathered beside each other on the device, after which they may be used again, and copied from there;
on their way back they are copied to the device and put into blocks that nobody uses yet.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from qwenfit.engine.copies import tensor_of, to_device

_PIECE = 16 << 20  # bytes of the host's memory that are taken at a time: pinned in a millisecond
_AHEAD = 8 << 30  # bytes that are free at most, beyond those in use: what is not needed is not taken
_THREADS = 3  # that take it: each makes a gigabyte of pages in half a second
_STAGED = 32 << 20  # bytes of the device for each of three copies under way; a 256th of the cache if that is less
_BACK = 512 << 20  # bytes that come back in a step: ten milliseconds
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

    The memory is taken as `keep_free` asks for it, and on a GPU by threads, as a gigabyte takes one half a second.
    A request takes its slots before its blocks are moved to them, so that moving cannot fail.
    """

    def __init__(self, cache: Blocks, nbytes: int) -> None:
        self._views = cache.by_block
        self._device = self._views[0].device
        block_bytes = sum(view[0].nbytes for view in self._views)
        self.most = nbytes // block_bytes
        self.at_once = max(1, min(_STAGED // block_bytes, cache.num_blocks // 256))  # blocks of a copy
        self.back_at_once = max(1, _BACK // block_bytes)  # in a step, beside which they come
        self.num_moved = 0  # blocks, either way
        self._ahead = max(1, _AHEAD // block_bytes)
        self._slots_of_piece = 1 << max(0, (_PIECE // block_bytes).bit_length() - 1)
        self._pieces: list[list[Tensor]] = []  # of each the parts for the views
        self._free: list[int] = []
        self._to_unpin: list[Tensor] = []
        weakref.finalize(self, _unpin, self._to_unpin)
        self._wanted = 0
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._ways: _Ways | None = None  # None: the cache is the host's own
        if self._device.type == "cuda" and self.most:
            self._ways = _Ways(self._views, self.at_once)

    @property
    def size(self) -> int:
        """Slots that there is memory for."""
        return len(self._pieces) * self._slots_of_piece

    @property
    def num_free(self) -> int:
        return len(self._free)

    def keep_free(self, count: int) -> None:
        """Have `count` free slots, soon, if those are no more than _AHEAD bytes, and all no more than `most`."""
        self._wanted = min(self.most, self.size - len(self._free) + min(count, self._ahead))
        if self._ways is None:
            self._grow()
        elif self.size < self._wanted and not any(thread.is_alive() for thread in self._threads):
            self._threads = [threading.Thread(target=self._grow_there, name="pinning") for _ in range(_THREADS)]
            for thread in self._threads:
                thread.start()

    def take(self, count: int) -> list[int] | None:
        """Free slots, or None if there are not so many."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def release(self, slots: list[int]) -> None:
        self._free += slots

    @torch.inference_mode()
    def move(self, out: Sequence[Pair], back: Sequence[Pair]) -> None:
        """Copy blocks to slots, (block, slot) each, and then slots to blocks, (slot, block).

        What the device does next finds the blocks read, and what it does after the next call the others written.
        """
        self.num_moved += len(out) + len(back)
        if self._ways is None:
            for block, slot in out:
                for view, part in zip(self._views, self._at(slot), strict=True):
                    part.copy_(view[block])
            for slot, block in back:
                for view, part in zip(self._views, self._at(slot), strict=True):
                    view[block].copy_(part)
            return
        here = torch.cuda.current_stream(self._device)
        here.wait_stream(self._ways.back)  # for what came back beside the step before
        for pairs in _parts(out, self.at_once):
            self._move_out(pairs, self._ways, here)
        if back:
            self._ways.back.wait_stream(self._ways.out)
            self._ways.back.wait_stream(here)  # the steps under way may still use the blocks
            with torch.cuda.stream(self._ways.back):
                for pairs in _parts(back, self.at_once):
                    self._move_back(pairs, self._ways.stage_back)

    def _move_out(self, pairs: Sequence[Pair], ways: _Ways, here: torch.cuda.Stream) -> None:
        ways.stages_out.rotate()
        stage = ways.stages_out[0]
        here.wait_event(stage.free)
        blocks = to_device(tensor_of([block for block, _ in pairs]), self._device)
        for view, staged in zip(self._views, stage.parts, strict=True):
            torch.index_select(view, 0, blocks, out=staged[: len(pairs)])
        ways.out.wait_stream(here)
        with torch.cuda.stream(ways.out):
            for i, (_, slot) in enumerate(pairs):
                for staged, part in zip(stage.parts, self._at(slot), strict=True):
                    part.copy_(staged[i], non_blocking=True)
        stage.free.record(ways.out)

    def _move_back(self, pairs: Sequence[Pair], stage: _Stage) -> None:
        for i, (slot, _) in enumerate(pairs):
            for staged, part in zip(stage.parts, self._at(slot), strict=True):
                staged[i].copy_(part, non_blocking=True)
        blocks = to_device(tensor_of([block for _, block in pairs]), self._device)
        for view, staged in zip(self._views, stage.parts, strict=True):
            view.index_copy_(0, blocks, staged[: len(pairs)])

    def _at(self, slot: int) -> Iterator[Tensor]:
        piece, i = divmod(slot, self._slots_of_piece)
        return (part[i] for part in self._pieces[piece])

    def _memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._ways is None:
            return torch.empty(shape, dtype=dtype)
        tensor = _touched(shape, dtype)
        with self._lock:  # one at a time, as the driver launches nothing meanwhile
            if _driver().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0) != 0:
                raise MemoryError("The driver pins no more memory.")
            self._to_unpin.append(tensor)
        return tensor

    def _grow_there(self) -> None:
        with torch.cuda.device(self._device):
            self._grow()

    def _grow(self) -> None:
        """Take memory until there is as much as is wanted; if there is no more, that is all."""
        while self.size < self._wanted:
            try:
                piece = [self._memory((self._slots_of_piece, *view.shape[1:]), view.dtype) for view in self._views]
            except (OSError, RuntimeError, MemoryError):
                self.most = self._wanted = self.size
                return
            with self._lock:
                first = self.size
                self._pieces.append(piece)
                self._free += range(first, min(self.most, first + self._slots_of_piece))


def _touched(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory to be pinned, whose pages are there: making them takes ten times as long as pinning does."""
    memory = mmap.mmap(-1, prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    tensor = torch.frombuffer(memory, dtype=dtype).view(shape)
    tensor.numpy().fill(0)
    return tensor


def _unpin(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        _driver().cudaHostUnregister(tensor.data_ptr())
    tensors.clear()


def _driver() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class _Ways:
    """Streams for the copies out and back, and memory on the device for those under way."""

    def __init__(self, views: list[Tensor], at_once: int) -> None:
        self.out = torch.cuda.Stream(views[0].device)  # type: ignore[no-untyped-call]
        self.back = torch.cuda.Stream(views[0].device)  # type: ignore[no-untyped-call]
        self.stages_out = deque(_Stage(views, at_once) for _ in range(2))
        self.stage_back = _Stage(views, at_once)


class _Stage:
    """Memory on the device for some blocks on their way, and when it is free again."""

    def __init__(self, views: list[Tensor], count: int) -> None:
        self.parts = [torch.empty(count, *view.shape[1:], dtype=view.dtype, device=view.device) for view in views]
        self.free = torch.cuda.Event()  # type: ignore[no-untyped-call]


def _parts(pairs: Sequence[Pair], count: int) -> Iterator[Sequence[Pair]]:
    return (pairs[i : i + count] for i in range(0, len(pairs), count))
