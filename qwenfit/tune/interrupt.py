"""SIGTERM and Ctrl-C: the step is finished and saved before the run ends; a second signal ends it at once."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any


class StopSignals:
    """`with StopSignals() as stop:` then `stop.signal` is None, or the signal that asks to stop."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        for number in self.SIGNALS:
            self._before[number] = signal.signal(number, self._asked)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
        # Not by print: the signal may have come while the run itself was writing to stderr, which is not reentrant.
        with suppress(OSError):
            os.write(2, b"\nstopping: this step is finished and saved first; once more stops at once\n")

    @property
    def exit_code(self) -> int:
        """143 after SIGTERM, 130 after Ctrl-C, 0 after neither."""
        return 0 if self.signal is None else 128 + self.signal
