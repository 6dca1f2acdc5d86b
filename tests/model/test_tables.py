"""Rotation, LogN and RMSNorm are those of the original code, bit for bit (tests/golden/README.md, tables)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from model.util import load_config, max_error
from safetensors.torch import load_file

from qwenfit.kernels.norm import rms_norm
from qwenfit.kernels.rotary import rotate
from qwenfit.model.rotary import Rotary, inverse_frequencies, logn_scale


def test_rope_tables(golden: Path) -> None:
    tables = load_file(golden / "tables" / "rope.safetensors")
    names = {key.rpartition(".")[0] for key in tables if key.startswith("dim")}
    assert len(names) == 11
    for name in names:
        dim, base, alpha = (int(n) for n in re.findall(r"\d+", name))
        inverse = inverse_frequencies(dim, base, alpha)
        radians = tables["positions"].long()[:, None] * inverse
        assert torch.equal(inverse, tables[f"{name}.inv_freq"])
        for table, half in (("cos", radians.cos()), ("sin", radians.sin())):
            assert torch.equal(torch.cat((half, half), -1), tables[f"{name}.{table}"])


def test_rotation(golden: Path) -> None:
    tables = load_file(golden / "tables" / "rope.safetensors")
    inverse = inverse_frequencies(128, 10000, 3.0)
    radians = torch.arange(33, 40)[:, None] * inverse
    cos, sin = radians.cos(), radians.sin()
    rotated = rotate(tables["rotate.x"], torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None])
    assert max_error(rotated, tables["rotate.y"]) < 1e-6


@pytest.mark.parametrize("training_length", [64, 2048, 8192, 32768])
def test_logn(golden: Path, training_length: int) -> None:
    tables = load_file(golden / "tables" / "logn.safetensors")
    scale = logn_scale(tables["index"].long(), training_length)
    assert torch.equal(scale, tables[f"seq{training_length}.logn"].float())
    assert torch.equal(scale.bfloat16(), tables[f"seq{training_length}.logn_bf16"])


def test_rms_norm(golden: Path) -> None:
    tables = load_file(golden / "tables" / "rmsnorm.safetensors")
    names = {key.rpartition(".")[0] for key in tables}
    assert {name.partition(".")[0] for name in names} == {"f32", "bf16", "f16"}
    for name in names:
        y = rms_norm(tables[f"{name}.x"], tables[f"{name}.weight"], float(name.partition("eps")[2]))
        assert torch.equal(y, tables[f"{name}.y"])


def test_ntk_alpha(golden: Path) -> None:
    config = load_config(golden / "qwen1" / "c_ntk")
    rows = json.loads((golden / "tables" / "tables.json").read_text())["ntk_alpha"]
    for training_length, length, alpha in rows:
        object.__setattr__(config, "training_length", training_length)
        assert config.ntk_alpha(length) == alpha


def test_sequences_of_one_step_keep_their_own_alpha(golden: Path) -> None:
    rotary = Rotary(load_config(golden / "qwen1" / "c_ntk"))
    positions = torch.tensor([5, 6, 7, 6, 7])
    mixed = rotary.angles(positions, [3, 2], [1.0, 7.0], 8, torch.float32)
    first = rotary.angles(positions[:3], [3], [1.0], 8, torch.float32)
    second = rotary.angles(positions[3:], [2], [7.0], 8, torch.float32)
    assert torch.equal(mixed.cos, torch.cat((first.cos, second.cos)))
    assert torch.equal(mixed.sin, torch.cat((first.sin, second.sin)))
    assert not torch.equal(first.cos[1:], second.cos)
