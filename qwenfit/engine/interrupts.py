"""Ctrl-C while the engine keeps its books: it waits until they are right again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """Within `taken`, a SIGINT that comes in `held`, but not in `allowed` there, waits for `tell`.

    Elsewhere, and in other threads than the main one, where Python raises no signal, nothing changes. The handler is
    set once for many steps: doing so costs 20 us of some hosts.
    """

    def __init__(self) -> None:
        self._held = False
        self._came: tuple[int, FrameType | None] | None = None
        self._before: Callable[[int, FrameType | None], Any] | None = None  # who handles it else

    @contextmanager
    def taken(self) -> Iterator[None]:
        """SIGINT comes here first, and what is still held at the end is handled then."""
        before = signal.getsignal(signal.SIGINT)
        if not _may_set_handlers() or not callable(before) or before == self._handle:
            yield
            return
        self._before = before
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            # Else it stays and hands all on: somebody calls it, or this is an abandoned stream's end in another thread.
            if signal.getsignal(signal.SIGINT) == self._handle and _may_set_handlers():
                signal.signal(signal.SIGINT, before)
            self.tell()

    @contextmanager
    def held(self) -> Iterator[None]:
        was, self._held = self._held, True
        try:
            yield
        finally:
            self._held = was

    @contextmanager
    def allowed(self) -> Iterator[None]:
        was, self._held = self._held, False
        try:
            self.tell()
            yield
        finally:
            self._held = was

    def tell(self) -> None:
        """Let the one handle it that does so elsewhere: it raises KeyboardInterrupt, as a rule."""
        came, self._came = self._came, None
        if came is not None and self._before is not None:
            self._before(*came)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._came = number, frame
        if not self._held:
            self.tell()


def _may_set_handlers() -> bool:
    return threading.current_thread() is threading.main_thread()
