"""Models in ModelScope's cache, by its own library, which honours MODELSCOPE_CACHE. Nothing here goes online."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from pathlib import Path
from typing import Any


def installed() -> bool:
    return importlib.util.find_spec("modelscope") is not None


def spellings(repo_id: str) -> list[str]:
    """Ids under which a model may lie there: the Qwen team's organisation was written in small letters once."""
    owner, _, name = repo_id.partition("/")
    return [f"qwen/{name}", f"Qwen/{name}"] if owner.lower() == "qwen" else [repo_id]


def cached_snapshot(repo_id: str) -> Path | None:
    """The folder of the cache that holds this model's config.json or its .gguf files; None also without the library."""
    if not installed():
        return None
    library = quiet("modelscope")
    for spelling in spellings(repo_id):
        try:
            folder = Path(library.snapshot_download(spelling, local_files_only=True))
        except Exception:  # what says that it is not there changed its type between versions
            continue
        if (folder / "config.json").exists() or any(folder.glob("*.gguf")):
            return folder
    return None


def cached_models() -> list[Any]:
    """The library's own description of every model in the cache: repo_id, size_on_disk, last_accessed, local_path."""
    if not installed():
        return []
    hub = quiet("modelscope_hub")
    return [repo for repo in hub.HubApi().scan_cache().repos if str(getattr(repo.repo_type, "value", "")) == "model"]


def remove(repo_id: str) -> int:
    """Delete a model, spelled as in `cached_models`; returns the bytes freed."""
    return int(quiet("modelscope_hub").HubApi().clear_cache(repo_type="model", repo_id=repo_id))


def quiet(module: str) -> Any:
    """The library, which otherwise tells of every cache that it finds."""
    library = importlib.import_module(module)
    for name in ("modelscope", "modelscope_hub"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return library
