"""A model of the Hugging Face Hub, by its id: its config and the headers of its weights, never the weights.

HF_HOME, HF_HUB_OFFLINE, HF_TOKEN and HF_ENDPOINT are honoured by huggingface_hub itself.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qwenfit.checkpoint import modelscope
from qwenfit.checkpoint.bounded import MAX_JSON_BYTES, shown
from qwenfit.checkpoint.config_json import read_config_json
from qwenfit.checkpoint.headers_safetensors import CONVERT_HINT, INDEX_NAME, MAX_TENSORS, stored_tensor
from qwenfit.config import TensorInfo
from qwenfit.errors import BadFile, NotFound, missing_extra

TIMEOUT_S = 3.0  # per answer: without a network a person hears of it within seconds


def cached_snapshot(repo_id: str) -> Path | None:
    """The folder of a local cache, Hugging Face's or ModelScope's, that holds this model's config.json or its .gguf.

    One with weights comes before one that has only the configuration yet.
    """
    folder = None
    if importlib.util.find_spec("huggingface_hub") is not None or not modelscope.installed():
        folder = _cached_by_the_hub(repo_id)
    if folder is not None and (any(folder.glob("*.safetensors")) or any(folder.glob("*.gguf"))):
        return folder
    return modelscope.cached_snapshot(repo_id) or folder


def _cached_by_the_hub(repo_id: str) -> Path | None:
    hub = _library()
    with _as_qwenfit_errors(repo_id) as errors:
        cached = hub.try_to_load_from_cache(repo_id, "config.json")
        if isinstance(cached, str):
            return Path(cached).parent
        try:
            folder = Path(hub.snapshot_download(repo_id, local_files_only=True))
        except errors.LocalEntryNotFoundError:
            return None
    return folder if any(folder.glob("*.gguf")) else None


def fetch_config(repo_id: str) -> dict[str, Any]:
    """config.json from the Hub, its size checked before the download. Raises NotFound when there is no network."""
    hub = _library()
    with _as_qwenfit_errors(repo_id):
        _check_size(hub, repo_id, "config.json")
        path = hub.hf_hub_download(repo_id, "config.json", etag_timeout=TIMEOUT_S)
    return read_config_json(path)


def fetch_tensors(repo_id: str) -> tuple[TensorInfo, ...]:
    """Every stored tensor, from the safetensors headers of the repository. Raises NotFound or BadFile."""
    hub = _library()
    with _as_qwenfit_errors(repo_id) as errors:
        with suppress(errors.RemoteEntryNotFoundError):  # a single file has no index
            _check_size(hub, repo_id, INDEX_NAME)
        files = hub.get_safetensors_metadata(repo_id, timeout=TIMEOUT_S).files_metadata
    tensors: dict[str, TensorInfo] = {}
    for file_name, metadata in files.items():
        what = shown(f"{repo_id}/{file_name}")
        for name, info in metadata.tensors.items():
            if name in tensors or len(tensors) >= MAX_TENSORS:
                raise BadFile(f"{what} repeats a tensor or lists more than {MAX_TENSORS:,}.")
            stored = stored_tensor(name, info.dtype, info.shape, info.data_offsets, what)
            tensors[name] = TensorInfo(name, stored.dtype, stored.shape, stored.nbytes)
    return tuple(tensors.values())


def _library() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError:
        raise missing_extra("huggingface_hub", "hub") from None


def _check_size(hub: Any, repo_id: str, file_name: str) -> None:
    size = hub.get_hf_file_metadata(hub.hf_hub_url(repo_id, file_name), timeout=TIMEOUT_S).size
    if size is None or size > MAX_JSON_BYTES:
        raise BadFile(f"{repo_id}/{file_name} has more than the {MAX_JSON_BYTES:,} bytes a file of its kind can need.")


@contextmanager
def _as_qwenfit_errors(repo_id: str) -> Iterator[Any]:
    errors: Any = importlib.import_module("huggingface_hub.errors")
    try:
        yield errors
    except errors.GatedRepoError:
        raise NotFound(f"{repo_id} is gated on the Hub.", "Accept its terms there, then export HF_TOKEN=...") from None
    except errors.RepositoryNotFoundError:
        raise NotFound(f"The Hub has no public model {repo_id}.", "For a private one, export HF_TOKEN=...") from None
    except errors.HFValidationError:
        raise NotFound(f"{repo_id!r} is no possible name of a model on the Hub.") from None
    except errors.NotASafetensorsRepoError:
        raise BadFile(f"{repo_id} has no safetensors weights, and pickles are not read.", CONVERT_HINT) from None
    except errors.SafetensorsParsingError:
        raise BadFile(f"{repo_id} has a safetensors file whose header is malformed.") from None
    except errors.OfflineModeIsEnabled:
        raise _offline(repo_id, "HF_HUB_OFFLINE is set") from None
    except errors.EntryNotFoundError:
        way = f"A GGUF repository? qwenfit pull {repo_id} --file '*q4_k_m*.gguf'"
        raise NotFound(f"{repo_id} has no config.json on the Hub.", way) from None
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", "an error")
        raise NotFound(f"The Hub answered {status} for {repo_id}.", "Try again later.") from None
    except (OSError, errors.HTTPError) as error:  # no route, no name, no answer in time
        raise _offline(repo_id, f"the Hub cannot be reached: {type(error).__name__}") from None


def _offline(repo_id: str, reason: str) -> NotFound:
    return NotFound(
        f"{repo_id} is neither in the catalog nor in a local cache, and {reason}.",
        "Name a folder, a config.json or a .gguf, or go online.",
    )
