"""A ModelConfig from anything a user names: a catalog name, a folder, a config.json, a .gguf or a Hub id."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

from qwenfit import catalog
from qwenfit.checkpoint.bounded import read_json_object, shown
from qwenfit.checkpoint.config_gguf import config_from_gguf
from qwenfit.checkpoint.config_json import config_from_dict, quantization_from, read_config_json
from qwenfit.checkpoint.fields import Fields
from qwenfit.checkpoint.headers_gguf import read_gguf_header
from qwenfit.checkpoint.headers_safetensors import (
    PICKLE_SUFFIXES,
    SafetensorsHeader,
    read_checkpoint_headers,
    refuse_pickle,
)
from qwenfit.config import ModelConfig, Quantization, TensorInfo, checkpoint_tensors
from qwenfit.errors import BadFile, NotFound, UsageError

_HUB_ID = re.compile(r"[\w][\w.-]{0,95}/[\w][\w.-]{0,95}", re.ASCII)
_PUBLISHED_NAME = re.compile(r"(.+?)(-Chat|-Instruct|-Base)?(-(?:GPTQ-)?Int[48]|-AWQ)?", re.IGNORECASE)
_QUANTIZED_NAME = re.compile(r"(?P<model>.+?)-(?:(?:GPTQ-)?Int(?P<bits>[48])|(?P<awq>AWQ))", re.IGNORECASE)
_FILE_SUFFIXES = (".gguf", ".json", ".safetensors", *PICKLE_SUFFIXES)


def resolve_model(spec: str | os.PathLike[str] | ModelConfig) -> ModelConfig:
    """The ModelConfig of what `spec` names; its `tensors` are set wherever the checkpoint's headers are at hand.

    A folder that holds a model comes before a catalog name, and the catalog before the Hub. Names of published
    quantized models (`Qwen-7B-Chat-Int4`, `Qwen2.5-7B-Instruct-AWQ`) are the catalog's model, quantized.
    Raises NotFound (also when offline), BadFile for files that are malformed, contradict themselves or are pickles,
    and UsageError for models that qwenfit does not handle.
    """
    try:
        return spec if isinstance(spec, ModelConfig) else _resolve(spec)
    except BadFile as error:
        error.hint = (
            error.hint or "Download the file again, or name another model: qwenfit models lists the known ones."
        )
        raise


def _resolve(spec: str | os.PathLike[str]) -> ModelConfig:
    text = os.fspath(spec).strip()
    if not text:
        raise UsageError("No model is named.", "qwenfit models lists what is known.")
    path = _expand(text)
    if text.startswith((".", "~", os.sep)) or text.lower().endswith(_FILE_SUFFIXES) or holds_model(path):
        return _from_path(path)
    if (config := _from_catalog(text)) is not None:
        return config
    if _exists(path):
        return _from_path(path)
    if _HUB_ID.fullmatch(text):
        return _from_hub(text)
    if os.sep in text:
        raise NotFound(f"There is no file or folder {shown(text)}.")
    return catalog.get_model(text)  # raises, with the nearest names


def hub_id(name: str) -> str | None:
    """The Hub id of a published name (`qwen-1.8b-chat` -> `Qwen/Qwen-1_8B-Chat`); OWNER/NAME as it is; None for others.

    Names of published quantized models are known too: `Qwen-7B-Chat-Int4`, `Qwen2.5-7B-Instruct-GPTQ-Int4`.
    """
    if "/" in name:
        return name
    match = _PUBLISHED_NAME.fullmatch(name.strip().replace("_", "."))
    config = catalog.find_model(match[1]) if match else None
    if match is None or config is None:
        return None
    kind, bits = (match[2] or "").title(), (match[3] or "").upper().replace("INT", "Int")
    return catalog.hub_name(config.name + kind + bits)


def weight_bytes(config: ModelConfig) -> int:
    """Bytes of the stored weights: exact from the headers where they were read, else computed."""
    tensors = checkpoint_tensors(config, config.dtype) if config.tensors is None else config.tensors
    return sum(tensor.nbytes for tensor in tensors)


def check_tensors(config: ModelConfig) -> ModelConfig:
    """Compare a config with its stored tensors by their shapes; BadFile when either lies about the other.

    A GPTQ file may leave out g_idx and the zero biases; vectors beyond need (rotary buffers) and a stored copy of a
    tied head are let be.
    """
    quantized = config.quantization is not None
    needed = Counter(
        tensor.shape
        for tensor in checkpoint_tensors(config)
        if not (quantized and tensor.name.endswith((".g_idx", ".bias")))
    )
    stored = Counter(tensor.shape for tensor in config.tensors or ())
    for shape in needed | stored:
        lacking = needed[shape] > stored[shape]
        matrix = len(shape) > 1 and shape != (config.vocab_size, config.hidden_size)
        if lacking or (matrix and stored[shape] > needed[shape]):
            size = " x ".join(map(str, shape)) or "scalar"
            raise BadFile(
                f"The config of {shown(config.name)} asks for {needed[shape]} tensors of shape {size} "
                f"and its files hold {stored[shape]}."
            )
    return config


def _expand(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~name of nobody
        raise NotFound(f"There is no home folder for {shown(text)}.") from None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than a file system takes
        return False


def holds_model(path: Path) -> bool:
    """Whether this is a folder with a config.json or a .gguf in it."""
    try:
        return path.is_dir() and ((path / "config.json").exists() or any(path.glob("*.gguf")))
    except OSError:
        return False


def _from_path(path: Path) -> ModelConfig:
    if not _exists(path):
        raise NotFound(f"There is no file or folder {shown(path)}.", "qwenfit models lists the names that need none.")
    suffix = path.suffix.lower()
    if path.is_dir():
        return _from_folder(path, path.resolve().name)
    if suffix in PICKLE_SUFFIXES:
        raise refuse_pickle(path)
    if suffix == ".gguf":
        return check_tensors(config_from_gguf(read_gguf_header(path)))
    if suffix == ".safetensors":
        raise UsageError(f"{shown(path)} is only the weights of a model.", f"Name its folder: {path.parent}")
    if path.name == "config.json":
        return _from_folder(path.parent, path.parent.resolve().name)
    return config_from_dict(read_config_json(path), path.stem, str(path))


def _from_folder(folder: Path, name: str) -> ModelConfig:
    """config.json with the headers beside it, or the one .gguf that is there."""
    try:
        ggufs = sorted(folder.glob("*.gguf"))
        has_config = (folder / "config.json").exists()
    except OSError as error:
        raise BadFile(f"{shown(folder)} cannot be read ({error.strerror}).") from None
    if has_config:
        config = config_from_dict(read_config_json(folder / "config.json"), name, str(folder))
        if config.quantization is None and (folder / "quantize_config.json").exists():  # AutoGPTQ before 0.5
            config = replace(config, quantization=_read_quantize_config(folder / "quantize_config.json"))
        headers = read_checkpoint_headers(folder)
        return check_tensors(replace(config, tensors=tensor_infos(headers))) if headers else config
    if len(ggufs) > 1:
        raise UsageError(f"{shown(folder)} holds {len(ggufs)} GGUF files.", f"Name one, e.g. {ggufs[0]}")
    if ggufs:
        return _from_path(ggufs[0])
    read_checkpoint_headers(folder)  # a folder of nothing but pickles is refused as such
    raise NotFound(f"{shown(folder)} holds neither a config.json nor a .gguf.")


def _read_quantize_config(path: Path) -> Quantization:
    return quantization_from(Fields(read_json_object(path), shown(path)))


def tensor_infos(headers: dict[str, SafetensorsHeader]) -> tuple[TensorInfo, ...]:
    """Every tensor of the files of a checkpoint, with its place."""
    return tuple(
        TensorInfo(name, t.dtype, t.shape, t.nbytes, str(header.path), header.data_start + t.begin)
        for header in headers.values()
        for name, t in header.tensors.items()
    )


def _from_catalog(name: str) -> ModelConfig | None:
    """A published name, of the 16-bit model or of its GPTQ or AWQ sibling (all: groups of 128)."""
    if (config := catalog.find_model(name)) is not None:
        return config
    match = _QUANTIZED_NAME.fullmatch(name)
    config = catalog.find_model(match["model"]) if match else None
    if match is None or config is None:
        return None
    if match["awq"]:
        quantization = Quantization("awq", 4, sym=False)
    else:
        quantization = Quantization("gptq", int(match["bits"]))
    suffix = "AWQ" if match["awq"] else f"Int{match['bits']}"
    return replace(config, name=f"{config.name}-{suffix}", dtype="float16", quantization=quantization)


def _from_hub(repo_id: str) -> ModelConfig:
    """The local Hugging Face cache first, then the Hub."""
    from qwenfit.checkpoint import hub

    name = repo_id.split("/")[1]
    snapshot = hub.cached_snapshot(repo_id)
    if snapshot is None:
        config = config_from_dict(hub.fetch_config(repo_id), name, f"the Hub: {repo_id}")
        return check_tensors(replace(config, tensors=hub.fetch_tensors(repo_id)))
    try:
        config = _from_folder(snapshot, name)
    except NotFound:  # some shards are not downloaded yet
        config = config_from_dict(read_config_json(snapshot / "config.json"), name, str(snapshot))
    if config.tensors is not None:
        return config
    try:
        return check_tensors(replace(config, tensors=hub.fetch_tensors(repo_id)))
    except NotFound:
        return replace(config, source=f"{snapshot} (weights computed: their headers are not cached, and offline)")
