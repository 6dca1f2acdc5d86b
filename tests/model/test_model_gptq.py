"""Int4 and Int8 Qwen-1 checkpoints give the logits of their dequantised weights (tests/golden/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model.util import Paged, max_error
from safetensors.torch import load_file

from qwenfit.checkpoint.load import load_model

TOLERANCE = 1e-4


@pytest.mark.parametrize("precision", ["as stored", "dequantised"])
@pytest.mark.parametrize("name", ["int4", "int8"])
def test_logits_and_tokens(golden: Path, name: str, precision: str) -> None:
    folder = golden / "qwen1_gptq" / name
    model, _ = load_model(folder, precision="fp32" if precision == "dequantised" else None, dtype=torch.float32)
    packed = model.get_submodule("layers.0.self_attn.qkv_proj").packed
    assert (packed is None) == (precision == "dequantised")
    expected = load_file(folder / "reference.safetensors")
    lengths = sorted({int(key[1:].split(".")[0]) for key in expected if key.startswith("L")})
    prompts = sorted({int(key[1:].split(".")[0]) for key in expected if key.startswith("P")})
    assert lengths and prompts
    for length in lengths:
        paged = Paged(model, 512)
        logits = paged.run(paged.chunk("s", expected[f"L{length}.input_ids"].tolist()))
        rows = expected[f"L{length}.positions"].long()
        assert max_error(logits[rows], expected[f"L{length}.logits"]) < TOLERANCE
    for prompt in prompts:
        new_ids = expected[f"P{prompt}.new_ids"].tolist()
        logits = Paged(model, 512).feed("s", expected[f"P{prompt}.input_ids"].tolist(), new_ids)
        assert max_error(logits, expected[f"P{prompt}.logits"]) < TOLERANCE
        assert logits.argmax(-1).tolist() == new_ids
