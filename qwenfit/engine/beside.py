"""A stream for the prompts of a step, which run beside the recorded part of it.

A step's prompts are bound by arithmetic and its decoding by the memory: one after the other, each leaves idle what the
other needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class SideStream:
    """Work between `fork` and the end of `run` goes beside what the current stream is given meanwhile.

    What it reads must have been given to the current stream before `fork`; what it makes is for after `run`. Memory
    allocated in `run` belongs to this stream: its next `fork` is after the current stream's use of it.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        """stream: not the current one; None: a new one."""
        self.stream = stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._forked = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def fork(self) -> None:
        self._forked.record(torch.cuda.current_stream(self.stream.device))

    @contextmanager
    def run(self) -> Iterator[None]:
        """Also after an exception the current stream goes on when this one has ended: memory is given back."""
        self.stream.wait_event(self._forked)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
