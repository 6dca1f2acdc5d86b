"""`qwenfit models`, `pull`, `ls`, `rm`: what is known, and what lies in the ecosystem's own cache.

The cache is huggingface_hub's (HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE and HF_TOKEN are honoured) or ModelScope's; both
are read and changed through their own libraries only.
"""

from __future__ import annotations

import errno
import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwenfit.catalog import dense_model_names, get_model
from qwenfit.checkpoint import modelscope
from qwenfit.checkpoint.resolve import hub_id
from qwenfit.errors import NotFound, QwenfitError, UsageError, missing_extra, nearest

# What a model needs; weights as .bin, and code, are never fetched.
PATTERNS = ("*.json", "*.safetensors", "*.tiktoken", "*.txt", "*.jinja", "*.gguf")
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)


@dataclass(frozen=True)
class CachedModel:
    """One model of a cache: its id, bytes on disk, when it was last used (seconds since 1970), whose cache it is."""

    id: str
    nbytes: int
    last_used: float
    path: str
    source: str = "huggingface"


def known_models() -> list[dict[str, Any]]:
    """Every dense model of the catalog with its size and context."""
    rows = []
    for name in dense_model_names():
        config = get_model(name)
        rows.append(
            {
                "model": name,
                "parameters": config.parameters,
                "layers": config.num_layers,
                "heads": config.num_heads,
                "kv_heads": config.num_kv_heads,
                "context": config.context_length,
                "kv_bytes_per_token_bf16": 2 * config.kv_elements_per_token,
            }
        )
    return rows


def repository(name: str) -> str:
    """The Hub id of a published name (`Qwen-7B` -> `Qwen/Qwen-7B`); an id with an owner is kept."""
    repo = hub_id(name)
    if repo is None:
        near = nearest(name, dense_model_names())
        ways = [f"Did you mean {', '.join(near)}?"] if near else []
        raise NotFound(f"There is no model {name!r}.", " ".join([*ways, "Models of others are named OWNER/NAME."]))
    return repo


def pull(
    name: str, source: str = "huggingface", revision: str | None = None, files: tuple[str, ...] | None = None
) -> str:
    """Download a model's configuration, tokenizer and weights into the cache; returns what to name to run it.

    That is the folder, or its .gguf where there is one alone. `files`: only what these patterns match, as one of the
    many quantizations that a GGUF repository holds. Raises NotFound when the model, the network or the library is
    missing, QwenfitError when the disk takes no more.
    """
    folder = Path(_download(repository(name), source, revision, list(files or PATTERNS)))
    ggufs = list(folder.glob("*.gguf"))
    if files and not any(file for pattern in files for file in folder.glob(pattern)):
        raise NotFound(f"{name} has no file that matches {' or '.join(files)}.", "look at its files on the Hub")
    alone = len(ggufs) == 1 and not (folder / "config.json").exists()
    return str(ggufs[0] if alone else folder)


def _download(repo: str, source: str, revision: str | None, patterns: list[str]) -> str:
    if source == "modelscope":
        return _pull_modelscope(repo, revision, patterns)
    if source != "huggingface":
        raise UsageError(f"There is no source {source!r}.", "--from huggingface or --from modelscope")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise missing_extra("huggingface_hub", "hub") from error
    errors: Any = importlib.import_module("huggingface_hub.errors")
    try:
        return str(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except errors.HFValidationError:
        raise NotFound(f"{repo!r} is no possible name of a model on the Hub.", "OWNER/NAME") from None
    except errors.GatedRepoError:
        raise NotFound(f"{repo} is gated on the Hub.", "Accept its terms there, then export HF_TOKEN=...") from None
    except errors.RepositoryNotFoundError as error:
        raise NotFound(f"The Hub has no model {repo}, or it is private.", "set HF_TOKEN for a private one") from error
    except errors.RevisionNotFoundError as error:
        raise NotFound(f"{repo} has no revision {revision!r}.", f"qwenfit pull {repo}") from error
    except (errors.LocalEntryNotFoundError, errors.HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in DISK:
            raise QwenfitError(
                f"{repo} cannot be written: {error.strerror}; what has come is kept.", "run the same again"
            ) from error
        raise NotFound(
            f"{repo} cannot be downloaded: the Hub is not reachable from here.",
            "check the network and HF_HUB_OFFLINE, or try --from modelscope",
        ) from error


def _pull_modelscope(repo: str, revision: str | None, patterns: list[str]) -> str:
    if not modelscope.installed():
        raise missing_extra("modelscope", "modelscope")
    spellings, cached = modelscope.spellings(repo), {model.repo_id for model in modelscope.cached_models()}
    spelling = next((known for known in spellings if known in cached), spellings[0])
    try:
        library = modelscope.library().compat
        return str(library.snapshot_download(spelling, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the library raises requests' and its own errors alike
        raise NotFound(f"{repo} cannot be downloaded from ModelScope.", "check the name and the network") from error


def cached_models() -> list[CachedModel]:
    """Models in huggingface_hub's cache and in ModelScope's, largest first."""
    found = [
        CachedModel(repo.repo_id, repo.size_on_disk, repo.last_accessed, str(repo.repo_path))
        for repo in _scan().repos
        if repo.repo_type == "model"
    ]
    for repo in modelscope.cached_models():
        used = repo.last_accessed.timestamp() if repo.last_accessed else 0.0
        found.append(CachedModel(repo.repo_id, repo.size_on_disk, used, repo.local_path, "modelscope"))
    return sorted(found, key=lambda model: -model.nbytes)


def find_cached(name: str) -> CachedModel:
    """The model of that name in a cache, Hugging Face's first. Raises NotFound, with the nearest names."""
    models = cached_models()
    wanted = hub_id(name) or name
    found = {(model.source, model.id): model for model in models}
    for key in (("huggingface", wanted), *(("modelscope", spelling) for spelling in modelscope.spellings(wanted))):
        if key in found:
            return found[key]
    near = nearest(name, [model.id for model in models])
    raise NotFound(
        f"{name or repr(name)} is not in the cache.", f"Did you mean {', '.join(near)}?" if near else "qwenfit ls"
    )


def remove(name: str) -> int:
    """Delete a model from the cache; returns the bytes freed. Raises NotFound when it is not there."""
    found = find_cached(name)
    if found.source == "modelscope":
        return modelscope.remove(found.id)
    info = _scan()
    repos = frozenset(r for r in info.repos if (r.repo_type, r.repo_id) == ("model", found.id))
    alone = replace(info, repos=repos)  # a mirror of another name may hold the same commits
    strategy = alone.delete_revisions(*(rev.commit_hash for repo in repos for rev in repo.revisions))
    strategy.execute()
    return int(strategy.expected_freed_size)


def _scan() -> Any:
    try:
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound
    except ImportError as error:
        if modelscope.installed():
            return _EmptyCache()
        raise missing_extra("huggingface_hub", "hub") from error
    try:
        return scan_cache_dir()
    except CacheNotFound:
        return _EmptyCache()


class _EmptyCache:
    repos: tuple[Any, ...] = ()
