"""Token ids to text as they come, with stop strings: nothing is shown that could still be part of one."""

from __future__ import annotations

from qwenfit.checkpoint.detokenizer import Detokenizer


class TextStream:
    """The text of one answer. `stopped_by` is the stop string that ended it, once one has."""

    __slots__ = ("_detokenizer", "_firsts", "_held", "_stops", "stopped_by")

    def __init__(self, detokenizer: Detokenizer, stops: tuple[str, ...] = ()) -> None:
        self._detokenizer = detokenizer
        self._stops = stops
        self._firsts = {stop[0] for stop in stops}
        self._held = ""  # may turn out to be the start of a stop string
        self.stopped_by: str | None = None

    def push(self, token: int, search: bool = True) -> str:
        """The text that `token` releases. `search=False`: too early to stop (min_tokens)."""
        text = self._detokenizer.push(token)
        if not self._stops or not search:
            return text
        return self._release(text)

    def finish(self) -> str:
        """What is left at the end; nothing after a stop string."""
        if self.stopped_by is not None:
            return ""
        text = self._release(self._detokenizer.finish())
        held, self._held = self._held, ""
        return text + held

    def _release(self, new: str) -> str:
        """Up to the first stop string, or all but the longest end that may begin one.

        No stop string can begin before `_held`: it was the longest such end.
        """
        text = self._held + new
        if self._firsts.isdisjoint(text):  # most texts: nothing ends or begins in them
            self._held = ""
            return text
        found = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            at, self.stopped_by = min(found)
            self._held = ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins (all of `stop` left out)."""
    return next((k for k in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:k])), 0)
