"""Launch parameters measured per card, kept as data in tuned/*.json; a shape that was not measured takes a rule.

tuned.json of the folder that QWENFIT_TUNED names comes before them: what bench/gpu_search.py found on one's own card.
"""

from __future__ import annotations

import functools
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from qwenfit.errors import BadFile, UsageError

Config = dict[str, int]
MANY_ROWS = 100  # of a weight, for each core of the card


def tuned(kernel: str, shape: tuple[int, ...]) -> Config:
    """The parameters of `kernel` for `shape` on the current card. `shape` ends with the number of activation rows."""
    return _lookup(kernel, shape, _card())


def measured(kernel: str, shape: tuple[int, ...]) -> Config | None:
    """As `tuned`, but None where there is no measurement."""
    return _table(_card()).get(key(kernel, shape))


def key(kernel: str, shape: tuple[int, ...]) -> str:
    """The name of a config in tuned/*.json; the number of rows is rounded up to a power of two."""
    return " ".join(map(str, (kernel, *shape[:-1], 1 << (shape[-1] - 1).bit_length())))


def put_in_force(configs: dict[str, Config]) -> None:
    """Use these configs on the current card from now on, before those of the files."""
    _table(_card()).update(configs)
    _lookup.cache_clear()


def replace_all(configs: dict[str, Config]) -> None:
    """Use these configs on the current card from now on, and no others."""
    _table(_card()).clear()
    put_in_force(configs)


def in_force() -> dict[str, Config]:
    """The configs of the current card."""
    return dict(_table(_card()))


def as_text(content: dict[str, Any]) -> str:
    """A file of tuned/: "cards" and "configs", a config to a line."""
    configs = ",\n".join(f"  {json.dumps(name)}: {json.dumps(config)}" for name, config in content["configs"].items())
    return f'{{\n "cards": {json.dumps(content["cards"])},\n "configs": {{\n{configs}\n }}\n}}\n'


@functools.lru_cache(maxsize=4096)
def _lookup(kernel: str, shape: tuple[int, ...], card: str) -> Config:
    found = _table(card).get(key(kernel, shape))
    return found if found is not None else _rule(kernel, shape)


@functools.cache
def _card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


@functools.cache
def _cores() -> int:
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 1


@functools.cache
def _table(card: str) -> dict[str, Config]:
    """Every file's configs are in force on the cards that it names, one's own before the others."""
    table: dict[str, Config] = {}
    for file in resources.files("qwenfit.kernels.triton").joinpath("tuned").iterdir():
        if file.name.endswith(".json"):
            content = json.loads(file.read_text())
            if card in content["cards"]:
                table.update(content["configs"])
    return table | _own_table(card)


def _own_table(card: str) -> dict[str, Config]:
    """The configs for the card in tuned.json of the folder that QWENFIT_TUNED names."""
    folder = os.environ.get("QWENFIT_TUNED")
    if not folder:
        return {}
    path = Path(folder, "tuned.json")
    again = "Unset it, or name the folder that `python -m qwenfit.bench.gpu_search --out FOLDER` wrote."
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as failure:  # a ValueError: no text, or a name that can be none
        cause = getattr(failure, "strerror", None) or failure
        raise UsageError(f"{path}, which QWENFIT_TUNED names, cannot be read: {cause}.", again) from None
    try:
        content = json.loads(text)
        cards, configs = content["cards"], content["configs"]
        if not isinstance(cards, list) or not all(_is_config(name, config) for name, config in configs.items()):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BadFile(f"{path}, which QWENFIT_TUNED names, is not a file of launch parameters.", again) from None
    return configs if card in cards else {}


NEEDED = {  # numbers of each kernel's configs that must be there
    "int_matvec": ("rows", "words", "warps", "programs"),
    "bf16_matvec": ("rows", "columns", "warps"),
    "bf16_tiles": ("rows", "columns", "splits", "warps", "beside"),
    "int_lanes": ("tiles", "warps", "ahead"),
    "int_matmul": ("m", "rows", "warps", "stages", "splits", "floats"),
    "decode_heads": ("tokens", "warps"),
    "decode_attention": ("tokens", "warps"),
}
LEAST = {"words": 4, "hold": 0, "early": 0, "floats": 0}  # else 1
POWERS = {"rows", "words", "columns", "warps", "tokens", "m", "tiles"}  # of two


def _is_config(name: str, config: Any) -> bool:
    """Whether a file's entry has the numbers that its kernel needs, of which a kernel can be made."""
    if not isinstance(config, dict) or not {*NEEDED.get(name.split(" ")[0], ())} <= {*config}:
        return False
    return all(
        type(number) is int
        and LEAST.get(what, 1) <= number < 1 << 16
        and (what not in POWERS or number.bit_count() == 1)
        for what, number in config.items()
    )


def _rule(kernel: str, shape: tuple[int, ...]) -> Config:
    """Wide tiles along the input, few rows of the weight: what was best for most shapes that were measured."""
    rows = shape[-1]
    if kernel == "int_matvec":
        needed = shape[1] * shape[0] // 32  # words of a row
        if rows == 1:
            return _matvec_rule(shape[0], needed, shape[2])
        if rows == 2 and 512 < needed <= 768 and shape[2] > 44 * _cores():
            return {"rows": 8, "words": 256, "warps": 2, "programs": 4 * _cores(), "hold": 1}
        if rows == 2 and needed > 1024:
            return {"rows": 8, "words": 512, "warps": 4, "programs": 3 * _cores()}
        words = min(2048, 1 << (needed - 1).bit_length())
        warps = max(1, words // 128)
        programs = _cores() * max(1, 16 // warps)
        return {"rows": 4 if rows <= 4 else 2, "words": words, "warps": warps, "programs": programs}
    if kernel == "bf16_matvec":
        return _bf16_rule(*shape) if rows == 1 else {"rows": 2 if rows > 4 else 4, "columns": 1024, "warps": 4}
    if kernel == "bf16_tiles":
        return _tiles_rule(bool(shape[0]), shape[2] // (1 + shape[0]))
    if kernel == "int_lanes":
        tiles = 2 if shape[0] else 1
        programs, warps = -(-shape[2] // (16 * tiles)), 2
        while programs * warps < 7 * _cores() and warps < min(8, shape[1] // 512):
            warps *= 2
        return {"tiles": tiles, "warps": warps, "ahead": 3 - tiles}
    if kernel == "int_matmul":
        return _matmul_rule(*shape)
    if kernel == "decode_heads":  # rows: heads of all sequences
        if shape[0] == 1:
            return {"tokens": 32, "warps": 1} if rows > 64 else {"tokens": 64, "warps": 4}
        if rows >= 6 * _cores():  # small programs leave less of the card idle at the end
            return {"tokens": 16, "warps": 2, "registers": 128}
        return {"tokens": 32, "warps": 4, "registers": 128}
    if rows == 1 and shape[0] <= 2 and shape[1] == 128:
        wide = shape[0] == 2 or shape[2] <= 4
        return {"tokens": 128, "warps": 8, "stages": 1} if wide else {"tokens": 64, "warps": 4, "stages": 1}
    if rows == 1 and shape[0] <= 2:
        return {"tokens": 64, "warps": 2 * shape[0], "stages": 1}
    if shape[0] == 1:
        return {"tokens": 64, "warps": 2, "stages": 3 if rows > 128 and shape[2] <= 5 else 1}
    if rows >= (64 if shape[2] <= 5 else 128):  # few heads share keys: more programs, so room for more of them counts
        return {"tokens": 64, "warps": 2, "stages": 3}
    return {"tokens": 64, "warps": 4}


def _bf16_rule(inputs: int, outputs: int, _: int) -> Config:
    """For one row of activations: few outputs, wide tiles; many, small programs for short rows."""
    cores = _cores()
    if outputs > 24 * cores:
        if 1024 < inputs <= 3072:
            wide = inputs > 2048
            return {"rows": 2, "columns": 512 if wide else 256, "warps": 2 if wide else 1}
        if inputs <= 1024 and outputs > 48 * cores:
            return {"rows": 4, "columns": 512, "warps": 1}
    elif inputs > 3072 and outputs > 16 * cores:
        return {"rows": 2, "columns": 1024, "warps": 4}
    elif inputs > 1024:
        return {"rows": 4, "columns": 2048, "warps": 8}
    return {"rows": 4, "columns": 1024, "warps": 4}


def _matvec_rule(bits: int, needed: int, outputs: int) -> Config:
    """For one row of activations; a row of the weight has `needed` words.

    Short rows are one piece, or a few, whose inputs are held; as wide tiles as leave every core something to do.
    """
    each = outputs / _cores()
    many, few = each >= MANY_ROWS, each <= 8
    if bits == 8 and 1792 < needed <= 3072 and each <= 16:
        tile, words, warps, beside = 4, 1024, 4, 3
    elif needed >= (1792 if bits == 8 else 513 if few else 1216):  # in pieces, inputs converted anew for each tile
        tile, words = (8, 512) if each <= 24 else (16, 512) if each <= 36 else (8, 256) if each <= 44 else (16, 256)
        beside = 8 if (tile, words) == (8, 256) else 4
        return {"rows": tile, "words": words, "warps": words // 128, "programs": beside * _cores()}
    elif needed <= 128:
        tile, words, warps, beside = 16, 128, 2, 3
    elif needed <= 256:
        tile, words, warps, beside = (8, 256, 2, 6) if bits == 8 and each >= 70 else (16, 256, 4, 3)
    elif needed <= 512 and bits == 4:
        tile, words, warps, beside = (8, 512, 8, 2) if many else (4, 512, 4, 4)
    elif needed <= 512:
        tile, words, warps, beside = (4, 512, 2, 6) if many else (8, 512, 4, 3)
    elif bits == 8:
        tile, words, warps, beside = (8, 1024, 4, 2) if many else (4, 512 if few else 1024, 4, 3)
    elif needed <= 768:
        tile, words, warps, beside = (8, 512, 4, 3) if many else (4, 1024, 8, 2)
    else:
        tile, words, warps, beside = 4, 512, 4, 4
    return {"rows": tile, "words": words, "warps": warps, "programs": beside * _cores(), "hold": 1}


def _tiles_rule(gated: bool, outputs: int) -> Config:
    """Programs for one round, two of them on a core where they leave each other memory enough."""
    cores = _cores()
    if gated:
        tile = 128 if outputs >= 76 * cores else 64
        beside = 2 if outputs > tile * cores else 1
        columns = 64 if tile == 128 and beside == 2 else 128
        return {"rows": tile, "columns": columns, "splits": 1, "warps": 4, "beside": beside}
    splits = next((n for n in (4, 2) if n * outputs <= 64 * cores), 1)
    return {"rows": 64, "columns": 128, "splits": splits, "warps": 4, "beside": 2}


def _matmul_rule(bits: int, inputs: int, outputs: int, rows: int) -> Config:
    """As many programs as a core holds at once, by splitting the inputs; fewer where a part would have few blocks."""
    m = min(128, max(16, 1 << (rows - 1).bit_length()))
    tiles, blocks = -(-rows // m) * -(-outputs // 64), inputs // 128
    most = (4 if m <= 32 else 2) * _cores()
    parts = (n for n in (8, 4, 2) if n * tiles <= most and blocks >= (4 if n * tiles <= 2 * _cores() else 7) * n)
    floats = int(m == 128 or (m == 64 and bits == 4))
    stages = 4 if m in (16, 64) else 3
    return {"m": m, "rows": 64, "warps": 4, "stages": stages, "splits": next(parts, 1), "floats": floats}
