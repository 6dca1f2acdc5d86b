"""Data files as rows: json, jsonl, parquet and txt, read as a stream, every row with its line.

A row that cannot be read is given out as the BadFile that says why: the caller decides whether to stop.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qwenfit.checkpoint.bounded import open_regular, parse_json_object, shown
from qwenfit.errors import BadFile, UsageError, missing_extra

MAX_ROW_BYTES = 8 << 20  # a JSON row; the longest book is under 8 MB
MAX_GROUP_BYTES = 2 << 30  # a row group of a parquet file, uncompressed
CHUNK = 1 << 20
BLOCK = 1 << 20  # a .txt is handed out in blocks of about this many bytes
SUFFIXES = (".json", ".jsonl", ".parquet")

Row = tuple[int, dict[str, Any] | BadFile]  # line (of parquet: row) from 1, and what is there
_SPACE = " \t\r\n"


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of one file. Raises NotFound, UsageError for an unknown kind of file, BadFile where no row can be read.

    .json and .jsonl: a list of objects, or an object a line, whichever the file begins with.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(f"{shown(path)} is none of the data files known: .txt, {', '.join(SUFFIXES)}.")
    with open_regular(path) as file:
        if suffix == ".parquet":
            yield from _parquet(file, path)
        else:
            start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
            file.seek(0)
            yield from (_list if start.startswith(b"[") else _lines)(file, path)


def _lines(file: BinaryIO, path: Path) -> Iterator[Row]:
    number = 0
    while raw := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if len(raw) > MAX_ROW_BYTES:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(CHUNK)
            yield number, _too_long(path, number)
            continue
        raw = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
        if raw.strip():
            yield number, _object(raw, path, number)


def _object(raw: bytes, path: Path, number: int) -> dict[str, Any] | BadFile:
    try:
        return parse_json_object(raw, f"{path}:{number}", max_values=MAX_ROW_BYTES)
    except BadFile as error:
        return error


def _too_long(path: Path, number: int) -> BadFile:
    return BadFile(f"{path}:{number} has more than {MAX_ROW_BYTES >> 20} MiB, the most that one row may have.")


def _list(file: BinaryIO, path: Path) -> Iterator[Row]:
    """The elements of a JSON list. After one that is cut short there is no telling where the next begins: it raises."""
    text = _Text(file, path)
    text.skip_space()
    text.at += 1  # the bracket
    first = True
    while (mark := text.skip_space()) != "]":
        if not first:
            if mark != ",":
                raise BadFile(f"{path}:{text.line}: a comma or the list's closing bracket is missing.")
            text.at += 1
            text.skip_space()
        first = False
        line = text.line
        yield line, _object(text.element().encode(), path, line)
    text.at += 1
    if text.skip_space():
        raise BadFile(f"{path}:{text.line}: something follows the end of the list.")


class _Text:
    """A window on a UTF-8 file that moves forward and counts lines."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.window, self.at, self.line, self.ended = "", 0, 1, False

    def more(self) -> None:
        """Drop what is behind, and read as much again as is left: so a long row is scanned few times."""
        self.window = self.window[self.at :]
        self.at = 0
        data = self.file.read(max(CHUNK, len(self.window)))
        self.window += _decoded(self.decode, data, self.path, self.line + self.window.count("\n"))
        self.ended = not data

    def skip_space(self) -> str:
        """The next character that is no space, not taken; "" at the end of the file."""
        while True:
            while self.at < len(self.window):
                mark = self.window[self.at]
                if mark not in _SPACE:
                    return mark
                self.line += mark == "\n"
                self.at += 1
            if self.ended:
                return ""
            self.more()

    def element(self) -> str:
        """The JSON value that begins here, as text."""
        while True:
            try:
                _, end = _DECODER.raw_decode(self.window, self.at)
                if end < len(self.window) or self.ended:  # a number may go on in the next chunk
                    break
            except json.JSONDecodeError as error:
                if self.ended:
                    line = self.line + self.window.count("\n", self.at, error.pos)
                    raise BadFile(f"{self.path}:{line} is not JSON or is cut short ({error.msg}).") from None
            except (RecursionError, ValueError):
                raise BadFile(f"{self.path}:{self.line} is nested too deeply or holds an endless number.") from None
            if len(self.window) - self.at > MAX_ROW_BYTES:
                raise BadFile(
                    f"{self.path}:{self.line} is not JSON, or has more than {MAX_ROW_BYTES >> 20} MiB in one row."
                )
            self.more()
        found = self.window[self.at : end]
        self.line += found.count("\n")
        self.at = end
        return found


_DECODER = json.JSONDecoder()


def read_text(path: Path) -> Iterator[tuple[int, str, bool]]:
    """A .txt file, one document, in blocks: (first line, text, whether it is the last). Raises NotFound and BadFile.

    A block ends with a line whose next begins with no space: no token spans such a cut. Only where there is no such
    place in MAX_ROW_BYTES is a block cut elsewhere.
    """
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    pending, number = "", 1
    with open_regular(path) as file:
        while data := file.read(BLOCK):
            pending += _decoded(decode, data, path, number + pending.count("\n"))
            cut = _safe_cut(pending)
            if not cut and len(pending) > MAX_ROW_BYTES:
                cut = MAX_ROW_BYTES
            if cut:
                yield number, pending[:cut], False
                number += pending.count("\n", 0, cut)
                pending = pending[cut:]
        pending += _decoded(decode, b"", path, number + pending.count("\n"))
    if pending:
        yield number, pending, True


def _decoded(decode: Callable[[bytes, bool], str], data: bytes, path: Path, line: int) -> str:
    """The text of the next bytes, none at the end; they begin in `line`."""
    try:
        return decode(data, not data)
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        raise BadFile(f"{path}:{line} is not UTF-8 text.") from None


def _safe_cut(text: str) -> int:
    """The end of the last line whose next begins with no space; 0 where there is none."""
    end = len(text) - 1
    while (end := text.rfind("\n", 0, end)) >= 0:
        if not text[end + 1].isspace():
            return end + 1
    return 0


def _parquet(file: BinaryIO, path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet as parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        raise missing_extra("pyarrow", "tune") from None
    number = 0
    try:
        source = parquet.ParquetFile(file)
        groups = (source.metadata.row_group(i).total_byte_size for i in range(source.metadata.num_row_groups))
        if max(groups, default=0) > MAX_GROUP_BYTES:
            raise BadFile(f"{path} has a row group of more than {MAX_GROUP_BYTES >> 30} GiB.")
        for batch in source.iter_batches(batch_size=64):
            for row in batch.to_pylist():
                number += 1
                yield number, _without_nulls(row)
    except (ValueError, OSError) as error:  # pyarrow's own errors are kinds of these
        reason = " ".join(str(error).split())[:160]
        raise BadFile(f"{path} cannot be read after row {number} ({reason}).") from None


def _without_nulls(value: Any) -> Any:
    """Columns hold a null where a row lacks the key."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
