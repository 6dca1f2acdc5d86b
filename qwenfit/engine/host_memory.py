"""Slots in the host's memory, which is taken as it is needed and pinned while a GPU goes on with its steps."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

_PIECE = 16 << 20  # bytes that are taken at a time: pinned in a millisecond
_AHEAD = 8 << 30  # bytes that are free at most, beyond those in use: what is not needed is not taken
_THREADS = 3  # that take it: each makes a gigabyte of pages in half a second


class HostMemory:
    """At most `nbytes` of slots, each of some tensors of the shapes and dtypes in `parts`.

    gpu: pin the memory for it, by threads. None: take it when it is asked for.
    """

    def __init__(
        self, parts: Sequence[tuple[torch.Size, torch.dtype]], nbytes: int, gpu: torch.device | None = None
    ) -> None:
        self._parts, self._gpu = list(parts), gpu
        slot_bytes = sum(prod(shape) * dtype.itemsize for shape, dtype in parts)
        self.most = nbytes // slot_bytes  # slots
        self.free: list[int] = []
        self._ahead = max(1, _AHEAD // slot_bytes)
        self._of_piece = 1 << max(0, (_PIECE // slot_bytes).bit_length() - 1)  # slots of a piece
        self._pieces: list[list[Tensor]] = []
        self._pinned: list[Tensor] = []
        self._wanted = self._begun = 0  # slots; those that there is memory for, or will be
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    @property
    def size(self) -> int:
        """Slots that there is memory for."""
        return min(self.most, len(self._pieces) * self._of_piece)

    def keep_free(self, count: int) -> None:
        """Have `count` free slots, soon, if those are no more than _AHEAD bytes, and all no more than `most`."""
        self._wanted = min(self.most, self.size - len(self.free) + min(count, self._ahead))
        if self._gpu is None:
            self._grow()
        elif self._begun < self._wanted and not any(thread.is_alive() for thread in self._threads):
            self._threads = [threading.Thread(target=self._grow, name="pinning") for _ in range(_THREADS)]
            try:
                for thread in self._threads:
                    thread.start()
            except RuntimeError:  # no more threads
                self._threads = [thread for thread in self._threads if thread.ident is not None]
                self.most = self.size

    def take(self, count: int) -> list[int] | None:
        """Free slots, or None if there are not so many."""
        if count > len(self.free):
            return None
        return [self.free.pop() for _ in range(count)]

    def release(self, slots: list[int]) -> None:
        """Slots that `take` gave."""
        self.free += slots

    def at(self, slot: int) -> Iterator[Tensor]:
        """The tensors of a slot."""
        piece, i = divmod(slot, self._of_piece)
        return (part[i] for part in self._pieces[piece])

    def close(self) -> None:
        """Unpin all, once what uses it is done; nothing is taken any more."""
        self._wanted = self.most = 0
        for thread in self._threads:
            thread.join()
        if self._pinned and self._gpu is not None:
            torch.cuda.synchronize(self._gpu)
        for tensor in self._pinned:
            _driver().cudaHostUnregister(tensor.data_ptr())
        self._pinned.clear()

    def _grow(self) -> None:
        """Take memory until there is as much as is wanted. Where that fails, what there is is all."""
        while True:
            with self._lock:
                if self._begun >= self._wanted:
                    return
                self._begun += self._of_piece
            try:
                piece = [self._taken((self._of_piece, *shape), dtype) for shape, dtype in self._parts]
            except (OSError, RuntimeError, MemoryError):
                with self._lock:
                    self._begun -= self._of_piece
                    self.most = self._wanted = min(self.most, self._begun)
                return
            with self._lock:
                first = len(self._pieces) * self._of_piece
                self._pieces.append(piece)
                self.free += range(first, min(self.most, first + self._of_piece))

    def _taken(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self._gpu is None:
            return torch.empty(shape, dtype=dtype)
        tensor = torch.frombuffer(mmap.mmap(-1, prod(shape) * dtype.itemsize), dtype=dtype).view(shape)
        tensor.numpy().fill(0)  # makes the pages, which takes ten times as long as pinning them
        with self._lock, torch.cuda.device(self._gpu):  # one at a time, as the driver launches nothing meanwhile
            if _driver().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0) != 0:
                raise MemoryError("The driver pins no more memory.")
            self._pinned.append(tensor)
        return tensor


def _driver() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
