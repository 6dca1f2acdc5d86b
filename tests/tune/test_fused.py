"""The fused kernels of training on a GPU, in Triton's interpreter: losses and gradients are those of the plain path."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend
from tune.tiny import losses_of, network, optimizer_of, samples, save_hf, settings, source

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("on a GPU test_gpu_tune.py compares with the CPU", allow_module_level=True)

from qwenfit.checkpoint.load import load_model
from qwenfit.kernels.triton import adamw
from qwenfit.tune import forward, loop, loss, optimizer
from qwenfit.tune.adapters import LoRA, add_lora, device_of, train_rows
from qwenfit.tune.batch import IGNORE, merged, targets_of
from qwenfit.tune.forward import batch_loss
from qwenfit.tune.loop import train_step
from qwenfit.tune.offload import embed
from qwenfit.tune.source import Rows, collate
from qwenfit.tune.world import World


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fused")
    return {kind: save_hf(folder / kind, kind=kind) for kind in ("qwen2", "qwen3")}


@pytest.fixture
def fused(monkeypatch):
    """A function that turns the fused kernels on."""

    def turn_on() -> None:
        for module in (forward, loss, optimizer):
            monkeypatch.setattr(module, "fusible", lambda device: True)
        monkeypatch.setattr(adamw, "_TILE", 1 << 14)  # the interpreter takes its time for each program

    return turn_on


def trained(folder, method: str, precision: str = "fp32", dropout: float = 0.0) -> nn.Module:
    model = load_model(folder, precision=precision, dtype=torch.float32)[0]
    torch.manual_seed(1)
    if method == "full":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    else:
        add_lora(model, LoRA(4, 8.0, dropout))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    if method == "rows":
        train_rows(model, [3, 7])
    return model.train()


def short(seed: int = 1) -> Rows:
    """One row of at most 12 tokens at a time: the interpreter is slow."""
    return source(count=6, micro_batch=1, seq_len=12, seed=seed)


def gradients(model, batch, **how) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(2)
    value = batch_loss(model, batch, 10.0, **how)
    value.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return float(value.detach()), grads


@pytest.mark.parametrize(
    ("kind", "method", "precision", "keep"),
    [
        ("qwen2", "lora", "fp32", "inputs"),
        ("qwen3", "lora", "fp32", "attention"),
        ("qwen2", "full", "fp32", "inputs"),
        ("qwen2", "lora", "int4", "all"),
    ],
)
def test_loss_and_gradients_are_those_of_the_plain_path(base, fused, kind, method, precision, keep):
    model = trained(base[kind], method, precision)
    batch = short().batch(0, 0)
    wanted, plain = gradients(model, batch, keep=keep)
    fused()
    got, grads = gradients(model, batch, keep=keep)
    assert got == pytest.approx(wanted, rel=1e-5)
    assert grads.keys() == plain.keys() and len(grads) > 16
    for name, grad in grads.items():
        torch.testing.assert_close(grad, plain[name], rtol=1e-3, atol=1e-5, msg=name)


def test_packed_samples_too(base, fused):
    model = trained(base["qwen2"], "lora")
    batch = collate([samples(2, longest=9), samples(1, longest=9)], 16, 0)
    wanted, plain = gradients(model, batch)
    fused()
    got, grads = gradients(model, batch)
    assert got == pytest.approx(wanted, rel=1e-5)
    assert all(torch.allclose(grads[name], plain[name], rtol=1e-3, atol=1e-5) for name in plain)


def test_a_layer_computed_again_draws_the_same_dropout_and_another_one_another(base, fused):
    model = trained(base["qwen2"], "lora", dropout=0.5)
    batch = short().batch(0, 0)
    fused()
    value, kept = gradients(model, batch, keep="all")
    for nest in (True, False):
        again, grads = gradients(model, batch, keep="inputs", nest=nest)
        assert again == value
        assert all(torch.equal(grads[name], kept[name]) for name in kept)
    torch.manual_seed(3)
    with torch.no_grad():
        assert float(batch_loss(model, batch, 10.0)) != value
        model.eval()
        assert float(batch_loss(model, batch, 10.0)) == float(batch_loss(model, batch, 10.0))


def test_a_block_that_runs_twice_keeps_its_input_alone(base, fused):
    fused()
    model = trained(base["qwen2"], "lora")
    kept: list[torch.Size] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden = forward.hidden_states(model, short().batch(0, 0))
    assert kept.count(hidden.shape) >= len(model.layers)
    assert len(kept) < len(model.layers) + 8  # the last norm's


def test_long_samples_take_cudnns_attention_on_hopper():
    from qwenfit.tune.fused import attention_order

    short, long = attention_order(1024, (9, 0)), attention_order(4096, (9, 0))
    assert short is not None and short[0] == SDPBackend.FLASH_ATTENTION and SDPBackend.MATH not in short
    assert (
        long is not None and long[0] == SDPBackend.CUDNN_ATTENTION and sorted(long, key=str) == sorted(short, key=str)
    )
    assert attention_order(4096, (8, 0)) is None


def test_gradients_of_dropped_inputs_are_those_of_finite_differences(base, fused):
    """Dropout's mask is the seed's, so the loss is a function of the weights."""
    fused()
    model = trained(base["qwen2"], "lora", dropout=0.3)
    batch = short().batch(0, 0)
    _, grads = gradients(model, batch)
    for module in ("self_attn.qkv_proj.lora_A", "mlp.down_proj.lora_A", "mlp.gate_up_proj.lora_B.1"):
        name = f"layers.0.{module}"
        parameter, direction = model.get_parameter(name), torch.randn_like(grads[name])
        direction /= direction.norm()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(direction, alpha=sign * 1e-2)
                torch.manual_seed(2)
                values.append(float(batch_loss(model, batch, 10.0, keep="all")))
                parameter.add_(direction, alpha=-sign * 1e-2)
        slope = (values[0] - values[1]) / 2e-2
        assert slope == pytest.approx(float((grads[name] * direction).sum()), rel=0.02, abs=1e-3), name


@pytest.mark.parametrize("method", ["lora", "rows", "full"])
def test_the_losses_of_a_run_are_those_of_the_plain_path(base, fused, method):
    config = settings(base["qwen2"], max_steps=3, lr=1e-3, micro_batch=1, grad_accum=1)
    wanted = losses_of(trained(base["qwen2"], method), config, short())
    fused()
    got = losses_of(trained(base["qwen2"], method), config, short())
    assert max(abs(a - b) for a, b in zip(got, wanted, strict=True)) < 1e-4


@pytest.mark.parametrize("packed", [False, True])
def test_micro_batches_run_together_give_the_same_step(base, monkeypatch, packed):
    few = samples(16)
    rows = [few[i : i + 2] for i in range(0, 16, 2)] if packed else [[s] for s in few[:8]]
    batches = [Rows(rows, 64, 2, 0, shuffle=False, pad=False).batch(0, i) for i in range(4)]
    assert len({b.input_ids.shape[1] for b in batches}) > 1  # of several widths
    found = []
    for together in (1, 3):
        monkeypatch.setattr(loop, "micro_batches_per_pass", lambda *sizes, count=together: count)
        model = trained(base["qwen2"], "lora")
        config = settings(base["qwen2"])
        row, bad = train_step(model, optimizer_of(model, config), batches, config, 1e-3, World())
        assert not bad
        found.append((row, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}))
    (one, alone), (two, joined) = found
    assert one["tokens"] == two["tokens"] and one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=1e-4)
    for name in alone:
        torch.testing.assert_close(alone[name], joined[name], rtol=1e-3, atol=2e-6)


def test_merged_micro_batches_keep_every_target_and_source():
    batches = [collate([[s]], len(s.input_ids), 0) for s in samples(5)]
    both = merged(batches, 2)
    assert [b.input_ids.shape[0] for b in both] == [2, 2, 1]
    assert [name for b in both for name in b.sources] == [name for b in batches for name in b.sources]
    wanted = sorted(t for b in batches for t in targets_of(b).flatten().tolist() if t != IGNORE)
    assert sorted(t for b in both for t in targets_of(b).flatten().tolist() if t != IGNORE) == wanted


def test_an_embedding_elsewhere_gives_the_same_rows(base):
    model = network(base["qwen2"])
    ids = torch.tensor([5, 0, 319, 5])
    wanted = model.embed_tokens(ids)
    assert torch.equal(embed(model.embed_tokens, ids, device_of(model)), wanted)
    assert embed(model.embed_tokens, ids, torch.device("meta")).device.type == "meta"
