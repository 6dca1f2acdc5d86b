"""The KV cache takes the bytes it says, and its uint8 forms lose what they should and no more."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model.util import Paged, load_config, load_golden, max_error
from safetensors.torch import load_file

from qwenfit.errors import UsageError
from qwenfit.kernels.kv_quant import dequantize_kv, quantize_kv, quantize_kv_qwen1
from qwenfit.model.kv_cache import KVCache, kv_bytes_per_token


def test_qwen1_quantizer_is_bit_exact(golden: Path) -> None:
    stored = load_file(golden / "kv_quant" / "kv_quant.safetensors")
    cases = json.loads((golden / "kv_quant" / "kv_quant.json").read_text())
    cases = cases if isinstance(cases, list) else cases["cases"]
    for case in cases:
        key = case["key"]
        q, scale, zero = quantize_kv_qwen1(stored[f"{key}.x"])
        assert torch.equal(q, stored[f"{key}.q"]), key
        assert torch.equal(scale, stored[f"{key}.scale"]) and torch.equal(zero, stored[f"{key}.zero"]), key
        assert torch.equal(scale * (q - zero), stored[f"{key}.dequant"]), key
    assert len(cases) >= 10


@given(
    seed=st.integers(0, 2**16),
    spread=st.sampled_from([0.0, 1e-6, 1.0, 1e4]),
    offset=st.sampled_from([0.0, -3.0, 1000.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_rounding_errs_by_half_a_step_at_most(seed: int, spread: float, offset: float, dtype: torch.dtype) -> None:
    x = (torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(seed)) * spread + offset).to(dtype)
    q, affine = quantize_kv(x)
    error = (dequantize_kv(q, affine, torch.float32) - x.float()).abs().amax(-1)
    wide = x.float()
    step = (wide.amax(-1) - wide.amin(-1)) / 255
    noise = 4 * torch.finfo(torch.float32).eps * (wide.abs().amax(-1) + 255 * step)
    assert (error <= step / 2 + noise).all()


def test_a_constant_vector_is_kept() -> None:
    x = torch.tensor([[2.5, 2.5], [0.0, 0.0], [-7.0, -7.0]])
    assert torch.equal(dequantize_kv(*quantize_kv(x), torch.float32), x)


# layers, kv heads, head width of qwen2.5-0.5b and qwen-7b; what a token takes.
@pytest.mark.parametrize(
    ("shape", "dtype", "expected"),
    [
        ((24, 2, 64), "bf16", 12 * 1024),
        ((32, 32, 128), "bf16", 512 * 1024),
        ((32, 32, 128), "fp32", 1024 * 1024),
        ((32, 32, 128), "int8", 2 * 32 * 32 * (128 + 8)),
    ],
)
def test_bytes_per_token(golden: Path, shape: tuple[int, int, int], dtype: str, expected: int) -> None:
    layers, kv_heads, head_dim = shape
    config = dataclasses.replace(
        load_config(golden / "qwen1" / "c_ntk"), num_layers=layers, num_kv_heads=kv_heads, head_dim=head_dim
    )
    assert kv_bytes_per_token(config, dtype) == expected


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32", "int8"])
def test_nbytes_is_what_is_allocated(golden: Path, dtype: str) -> None:
    config = load_config(golden / "qwen2_qwen3" / "qwen3_tied")
    cache = KVCache(config, num_blocks=7, block_size=16, dtype=dtype)
    assert cache.nbytes == 7 * 16 * kv_bytes_per_token(config, dtype)
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for layer in cache.layers
        for t in (layer.key, layer.value, layer.key_affine, layer.value_affine)
        if t is not None
    }
    assert sum(storages.values()) == cache.nbytes


def test_an_unknown_dtype_is_refused(golden: Path) -> None:
    with pytest.raises(UsageError):
        KVCache(load_config(golden / "qwen1" / "c_ntk"), 1, 16, "int4")


@pytest.mark.parametrize(("dtype", "bound"), [("fp16", 0.02), ("bf16", 0.15), ("int8", 0.15)])
def test_a_smaller_cache_changes_logits_little(golden: Path, dtype: str, bound: float) -> None:
    """Logits have a standard deviation of about 2. Int8 costs no more than bf16 does."""
    folder = golden / "qwen1" / "c_ntk"
    expected = load_file(folder / "decode.safetensors")
    new_ids = expected["P100.new_ids"].tolist()
    logits = Paged(load_golden(folder), 256, dtype).feed("s", expected["P100.input_ids"].tolist(), new_ids)
    assert 0 < max_error(logits, expected["P100.logits"]) < bound


def test_a_large_key_bias_costs_an_int8_cache_nothing(golden: Path) -> None:
    """As in Qwen2.5, where it reaches 200 in dimensions that hardly turn and is the same in every key."""
    folder = golden / "qwen2_qwen3" / "qwen2_tied"
    ids = torch.randint(0, 64, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    model = load_golden(folder)
    config = model.config
    for layer in model.layers:
        key_bias = layer.self_attn.qkv_proj.bias.data[config.q_size :][: config.kv_size]
        key_bias.view(config.num_kv_heads, config.head_dim)[:, config.head_dim // 2 - 1] += 200.0
    exact, int8 = (Paged(model, 64, dtype).feed("s", ids[:40], ids[40:]) for dtype in ("fp32", "int8"))
    assert 0 < max_error(int8, exact) < 0.15
