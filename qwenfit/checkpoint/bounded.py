"""Reading files that nobody has vouched for: what they may cost is fixed before they are opened."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from qwenfit.errors import BadFile, NotFound

MAX_JSON_BYTES = 4 * 2**20  # the largest published Qwen index is under 0.5 MB
MAX_JSON_VALUES = 160_000  # commas and opening brackets: each may cost some hundred bytes once parsed


def shown(text: object) -> str:
    """A name or path for an error message: quoted, on one line, at most 160 characters."""
    try:
        quoted = repr(str(text))
    except (ValueError, RecursionError):  # an integer of thousands of digits, or lists nested a thousand deep
        return "a value too long to print"
    return quoted if len(quoted) <= 160 else quoted[:156] + "..." + quoted[0]


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. Raises NotFound when it is absent, BadFile when it is anything else."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise BadFile(f"{shown(path)} is a directory where a file is expected.")
        if not stat.S_ISREG(mode):  # opening a pipe would wait for ever
            raise BadFile(f"{shown(path)} is not a regular file.")
        return open(path, "rb")
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"There is no file {shown(path)}.") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte inside the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise BadFile(f"{shown(path)} cannot be read ({reason}).") from None


def read_json_object(path: Path, limit: int = MAX_JSON_BYTES, max_values: int = MAX_JSON_VALUES) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; the size is checked before anything is read."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise BadFile(f"{shown(path)} has {size:,} bytes, more than the {limit:,} a file of its kind can need.")
        try:
            raw = file.read(limit)
        except OSError as error:
            raise BadFile(f"{shown(path)} cannot be read ({error.strerror}).") from None
    return parse_json_object(raw, shown(path), max_values)


def parse_json_object(raw: bytes, what: str, max_values: int = MAX_JSON_VALUES) -> dict[str, Any]:
    """Strict JSON: UTF-8, one object, no repeated key, no NaN or Infinity. `what` begins the error's sentence."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise BadFile(f"{what} has the key {shown(twice)} twice.")
        return table

    def constant(word: str) -> Any:
        raise BadFile(f"{what} holds {word}, which is not JSON.")

    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > max_values:
        raise BadFile(f"{what} holds more than {max_values:,} JSON values, more than any Qwen needs.")
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except UnicodeDecodeError:
        raise BadFile(f"{what} is not UTF-8 text.") from None
    except RecursionError:
        raise BadFile(f"{what} is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise BadFile(f"{what} is not JSON or is cut short ({error.msg} at line {error.lineno}).") from None
    except ValueError:  # Python refuses to convert integers of thousands of digits
        raise BadFile(f"{what} holds a number of too many digits.") from None
    if not isinstance(value, dict):
        raise BadFile(f"{what} is not a JSON object.")
    return value
