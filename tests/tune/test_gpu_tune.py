"""On a GPU in bfloat16 the trainer follows the losses of the CPU in float32, whatever is kept, packed or offloaded."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch
from tune.tiny import optimizer_of, samples, save_hf, settings

from qwenfit.checkpoint.load import load_model
from qwenfit.config import ModelConfig
from qwenfit.tune.adapters import LoRA, add_lora, freeze, train_rows, train_tables
from qwenfit.tune.loop import Hooks, train
from qwenfit.tune.source import Rows
from qwenfit.tune.state import State

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CONFIG = ModelConfig(
    name="tiny",
    architecture="qwen2",
    hidden_size=128,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    intermediate_size=256,
    vocab_size=320,
    tie_word_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    context_length=512,
    training_length=512,
)
STEPS = 8


@functools.cache
def checkpoint() -> Path:
    sizes = {name: getattr(CONFIG, name) for name in ("hidden_size", "intermediate_size", "vocab_size")}
    heads = {"num_attention_heads": CONFIG.num_heads, "num_key_value_heads": CONFIG.num_kv_heads}
    return save_hf(Path(tempfile.mkdtemp(prefix="qwenfit-")), **sizes, **heads)


@functools.cache
def losses(device: str, precision: str, method: str = "lora", packed: bool = False, **changes) -> list[float]:
    """Two epochs of four steps on the same weights on every device: random ones, or for int4 and int8 a file's."""
    torch.manual_seed(0)
    if precision.startswith("int"):  # random codes are drawn in the layout of a device's kernels
        model, _ = load_model(checkpoint(), precision=precision, device=device)
    else:
        model, _ = load_model(CONFIG, precision=precision, device=device, random_weights=True, seed=1)
    if method == "full":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    else:
        freeze(model)
        add_lora(model, LoRA(8, 16.0, 0.0))
    if method == "lora-emb":
        train_tables(model)
    if method == "rows":
        train_rows(model, [3, 7])
    config = settings("tiny", max_steps=STEPS, lr=4e-3, **changes)
    few = samples(32 if packed else 16, longest=60)
    rows = [few[i : i + 2] for i in range(0, 32, 2)] if packed else [[s] for s in few]
    found: list[dict] = []
    hooks = Hooks(found.append, lambda state: None)
    train(model, optimizer_of(model, config), Rows(rows, 128 if packed else 64, 2, 0), None, config, State(), hooks)
    return [row["loss"] for row in found]


def fall(curve: list[float]) -> float:
    """How far the mean loss of the second epoch lies below that of the first, which holds the same samples."""
    half = STEPS // 2
    return (sum(curve[:half]) - sum(curve[half:])) / half


def check_follows(curve: list[float], exact: list[float], tolerance: float, what: object = "") -> None:
    apart = max(abs(a - b) for a, b in zip(curve, exact, strict=True))
    assert apart < tolerance, f"{what} {apart:.2g} apart:\n{curve}\n{exact}"


@pytest.mark.parametrize(
    ("method", "packed"), [("full", False), ("lora", False), ("lora", True), ("lora-emb", True), ("rows", False)]
)
def test_bf16_on_the_gpu_follows_float32_on_the_cpu(method, packed):
    exact = losses("cpu", "fp32", method, packed)
    assert fall(exact) > 0.01, exact
    check_follows(losses("cuda", "bf16", method, packed), exact, 0.02, "bf16")
    check_follows(losses("cuda", "fp32", method, packed), exact, 1e-3, "fp32")


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_q_lora_follows_the_cpu(precision):
    """Both round activations to bfloat16, each in its own way, and Adam's first steps follow the signs of gradients."""
    exact = losses("cpu", precision)
    curve = losses("cuda", precision)
    check_follows(curve[:2], exact[:2], 1e-3)  # before and after the first step
    check_follows(curve, exact, 0.06)
    assert abs(fall(curve) - fall(exact)) < 0.1 * fall(exact)


@pytest.mark.parametrize(
    ("packed", "keep", "offload"),
    [(False, "inputs", True), (False, "attention", False), (False, "all", True), (True, "inputs", False),
     (True, "attention", True)],
)  # fmt: skip
def test_what_is_kept_and_where_changes_no_loss(packed, keep, offload, monkeypatch):
    from qwenfit.tune import offload as offloading

    monkeypatch.setattr(offloading, "MIN_BYTES", 1)
    plain = losses("cuda", "bf16", packed=packed, keep="all")
    check_follows(losses("cuda", "bf16", packed=packed, keep=keep, offload=offload), plain, 5e-3)


@pytest.mark.parametrize(("optimizer", "moments"), [("fp32", "bf16"), ("8bit", "bf16"), ("bf16", "bf16")])
def test_every_regime_learns_on_the_gpu(optimizer, moments):
    wide = losses("cuda", "bf16", "full")
    narrow = losses("cuda", "bf16", "full", optimizer=optimizer, moments=moments)
    assert abs(fall(narrow) - fall(wide)) < 0.1 * fall(wide), f"{narrow}\n{wide}"
