"""Models in ModelScope's cache, by its own library, which honours MODELSCOPE_CACHE. Nothing here goes online."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from pathlib import Path
from typing import Any

from qwenfit.checkpoint.resolve import holds_model


def installed() -> bool:
    """The library and its cache: modelscope from 1.38 on keeps it by modelscope_hub."""
    return all(importlib.util.find_spec(name) is not None for name in ("modelscope", "modelscope_hub"))


def spellings(repo_id: str) -> list[str]:
    """Ids under which a model may lie there: the Qwen team's organisation was written in small letters once."""
    owner, _, name = repo_id.partition("/")
    return [f"qwen/{name}", f"Qwen/{name}"] if owner.lower() == "qwen" else [repo_id]


def cached_snapshot(repo_id: str) -> Path | None:
    """The folder of the cache that holds this model's config.json or its .gguf files; None also without the library."""
    if not installed():
        return None
    for spelling in spellings(repo_id):
        try:
            folder = Path(library().compat.snapshot_download(spelling, local_files_only=True))
        except Exception:  # what says that it is not there changed its type between versions; a broken one has none
            continue
        if holds_model(folder):
            return folder
    return None


def cached_models() -> list[Any]:
    """The library's own description of every model in the cache: repo_id, size_on_disk, last_accessed, local_path."""
    if not installed():
        return []
    try:
        repos = library().HubApi().scan_cache().repos
    except (ImportError, OSError):
        return []
    return [repo for repo in repos if "/" in repo.repo_id and str(getattr(repo.repo_type, "value", "")) == "model"]


def remove(repo_id: str) -> int:
    """Delete a model, spelled as in `cached_models`; returns the bytes freed."""
    return int(library().HubApi().clear_cache(repo_type="model", repo_id=repo_id))


def library() -> Any:
    """modelscope_hub, which otherwise tells of every cache that it finds."""
    module = importlib.import_module("modelscope_hub")
    importlib.import_module("modelscope_hub.compat")
    logging.getLogger("modelscope_hub").setLevel(logging.WARNING)
    return module
