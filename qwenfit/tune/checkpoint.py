"""Checkpoints of a run that survive any interruption: a folder either verifies as a whole or does not count.

A checkpoint is written aside, each file and the folder flushed to disk; a manifest with every file's size and SHA-256
comes last, then one rename gives it its name. Old ones go only when the new one has been read back and verified.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwenfit import __version__
from qwenfit.checkpoint.bounded import read_json_object
from qwenfit.errors import QwenfitError

MANIFEST = "MANIFEST.json"
MAKE_ROOM = "Make room or mend that, then run the same command again with --resume."
_NAME = re.compile(r"step-(\d{8})")


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def save(
    root: Path,
    step: int,
    write: Callable[[Path], None],
    *,
    keep_last: int,
    protect: int | None = None,
    versions: dict[str, str] | None = None,
) -> Path:
    """Checkpoint `step` in `root`, its files written by `write(folder)`; returns the folder.

    Keeps the newest `keep_last` that verify, and checkpoint `protect`. An equal step that verifies is kept as it is.
    Raises QwenfitError when it cannot be written: earlier checkpoints are untouched then.
    """
    final = folder_of(root, step)
    if final.exists() and not problem(final):
        return final
    aside = root / f".tmp-{step:08d}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        write(aside)
        files = {path.name: _flushed(path) for path in sorted(aside.iterdir())}
        manifest = {"step": step, "files": files, "versions": {"qwenfit": __version__, **(versions or {})}}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
        _flush(aside / MANIFEST)
        _flush(aside)
        if final.exists():  # damaged: a checkpoint that verifies was returned above
            shutil.rmtree(final)
        os.replace(aside, final)
        _flush(root)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not is_disk_error(error):
            raise
        last = newest(root)[0]
        kept = f"{last.name} is untouched" if last is not None else "there is no earlier one"
        raise QwenfitError(
            f"The checkpoint of step {step} cannot be written to {root}: {_reason(error)}; {kept}.", MAKE_ROOM
        ) from error
    if not problem(final):
        _prune(root, keep_last, protect)
    return final


def is_disk_error(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"


def not_written(error: Exception, output: Path) -> QwenfitError:
    """The error to show where something else than a checkpoint cannot be written to a run's folder."""
    last = newest(output / "checkpoints")[0]
    kept = f"{last.name} is untouched" if last is not None else "there is no checkpoint yet"
    where = getattr(error, "filename", None) or output
    return QwenfitError(f"The run cannot go on: {where}: {_reason(error)}; {kept}.", MAKE_ROOM)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def _flushed(path: Path) -> dict[str, Any]:
    """Flush a file to disk; its size and hash for the manifest."""
    _flush(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def problem(folder: Path) -> str:
    """Why a checkpoint does not verify; empty when it does."""
    try:
        files = read_json_object(folder / MANIFEST).get("files")
    except QwenfitError as error:
        return error.message
    if not isinstance(files, dict) or not files:
        return "its manifest lists no files"
    for name, wanted in files.items():
        path = folder / name
        if "/" in name or not isinstance(wanted, dict) or not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != wanted.get("bytes") or _sha256(path) != wanted.get("sha256"):
            return f"{name} has changed"
    return ""


def checkpoints(root: Path) -> list[Path]:
    """The checkpoints of a run by name, newest first, verified or not."""
    if not root.is_dir():
        return []
    return sorted((p for p in root.iterdir() if _NAME.fullmatch(p.name)), reverse=True)


def newest(root: Path) -> tuple[Path | None, list[str]]:
    """(the newest checkpoint that verifies or None, what was found wrong with newer ones)."""
    wrong: list[str] = []
    for folder in checkpoints(root):
        if not (found := problem(folder)):
            return folder, wrong
        wrong.append(f"{folder.name} does not verify ({found}).")
    return None, wrong


def _prune(root: Path, keep_last: int, protect: int | None) -> None:
    """Remove what is older than the newest `keep_last`, and what an interrupted save left."""
    for folder in checkpoints(root)[keep_last:]:
        if protect is None or folder != folder_of(root, protect):
            shutil.rmtree(folder, ignore_errors=True)
    for left in root.glob(".tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
