"""Token ids to text, one at a time: never half a character, constant work a token."""

from __future__ import annotations

import codecs
from collections.abc import Callable


class Detokenizer:
    """The text of one answer as its ids come. What `push` and `finish` return joins to what `decode` gives at once."""

    __slots__ = ("_token_bytes", "_utf8")

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        # Holds back the bytes of an unfinished character; bytes that cannot become one turn into U+FFFD.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int, /) -> str:
        """The characters that this token completes. Raises UsageError for an id without text."""
        return self._utf8.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        """U+FFFD when the answer ended inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)
