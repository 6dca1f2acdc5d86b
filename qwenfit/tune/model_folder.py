"""The files of a model folder beside its weights, taken over from the base model: without them it is half a model."""

from __future__ import annotations

import shutil
from pathlib import Path

from qwenfit.checkpoint import tokenizer_export
from qwenfit.checkpoint.bounded import read_json_object
from qwenfit.checkpoint.names import QWEN2, Layout, layout_of
from qwenfit.checkpoint.save import hf_config, served_length, write_json
from qwenfit.config import ModelConfig

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def write_model_files(base: ModelConfig, dtype: str, folder: Path) -> Layout:
    """config.json, tokenizer, templates and licence into `folder`; returns the layout that its weights must have.

    base: a model on disk. A folder's files are copied and its layout is kept; a GGUF becomes the Qwen2 layout.
    """
    source = Path(base.source)
    if not source.is_dir():
        tokenizer = tokenizer_export.from_gguf(source, served_length(base))
        stops = {"eos_token_id": tokenizer.eos_ids, "pad_token_id": tokenizer.pad_id}
        ends = {"eos_token_id": tokenizer.eos_ids[0], "bos_token_id": tokenizer.pad_id}
        write_json(folder / "config.json", hf_config(base, dtype) | ends)
        write_json(folder / "tokenizer.json", tokenizer.tokenizer)
        write_json(folder / "tokenizer_config.json", tokenizer.settings)
        write_json(folder / "generation_config.json", stops)
        return QWEN2
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(WEIGHT_FILES) and not path.name.startswith("."):
            shutil.copyfile(path, folder / path.name)
    table = read_json_object(source / "config.json")
    for key in ("torch_dtype", "dtype"):
        if key in table:
            table[key] = dtype
    write_json(folder / "config.json", table)
    return layout_of(base, gguf=False)
