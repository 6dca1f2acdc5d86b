"""On a GPU in bfloat16 the trainer follows the losses of the CPU in float32, whatever is kept, packed or offloaded."""

from __future__ import annotations

import functools

import pytest
import torch
from tune.tiny import optimizer_of, samples, settings

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
    hidden_size=256,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    intermediate_size=512,
    vocab_size=320,
    tie_word_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    context_length=512,
    training_length=512,
)


@functools.cache
def losses(device: str, precision: str, method: str = "lora", packed: bool = False, **changes) -> list[float]:
    """Twelve steps on random weights, the same for the same seed on every device."""
    torch.manual_seed(0)
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
    config = settings("tiny", max_steps=12, lr=1e-3, **changes)
    few = samples(48, longest=60)
    rows = [few[i : i + 4] for i in range(0, 48, 4)] if packed else [[s] for s in few]
    found: list[dict] = []
    hooks = Hooks(found.append, lambda state: None)
    train(model, optimizer_of(model, config), Rows(rows, 256 if packed else 64, 2, 0), None, config, State(), hooks)
    return [row["loss"] for row in found]


def apart(one: list[float], two: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("method", ["full", "lora", "lora-emb", "rows"])
@pytest.mark.parametrize("packed", [False, True])
def test_bf16_on_the_gpu_follows_float32_on_the_cpu(method, packed):
    exact = losses("cpu", "fp32", method, packed)
    assert exact[-1] < exact[0]
    assert apart(losses("cuda", "bf16", method, packed), exact) < 0.02
    assert apart(losses("cuda", "fp32", method, packed), exact) < 1e-3


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_q_lora_follows_the_cpu(precision):
    assert apart(losses("cuda", precision), losses("cpu", precision)) < 0.02


@pytest.mark.parametrize("packed", [False, True])
def test_what_is_kept_and_where_changes_no_loss(packed, monkeypatch):
    from qwenfit.tune import offload

    monkeypatch.setattr(offload, "MIN_BYTES", 1)
    plain = losses("cuda", "bf16", packed=packed, keep="all")
    for keep in ("inputs", "attention", "all"):
        for offloaded in (False, True):
            assert apart(losses("cuda", "bf16", packed=packed, keep=keep, offload=offloaded), plain) < 5e-3, keep


@pytest.mark.parametrize(("optimizer", "moments"), [("fp32", "bf16"), ("8bit", "bf16"), ("bf16", "bf16")])
def test_every_regime_learns_on_the_gpu(optimizer, moments):
    wide = losses("cuda", "bf16", "full")
    narrow = losses("cuda", "bf16", "full", optimizer=optimizer, moments=moments)
    assert abs(narrow[-1] - wide[-1]) < 0.1 * (wide[0] - wide[-1])
