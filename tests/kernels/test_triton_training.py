"""The kernels of training and their gradients against the plain operations, at odd sizes."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton_cases import DEVICE, error, poisoned, random

pytest.importorskip("triton")
from qwenfit.kernels.triton import adamw as adamw_module
from qwenfit.kernels.triton import cross_entropy as loss_module
from qwenfit.kernels.triton.adamw import Update, adamw, adamw_reference
from qwenfit.kernels.triton.cross_entropy import cross_entropy, cross_entropy_reference
from qwenfit.kernels.triton.dropout import dropout, dropout_backward, keep_scale
from qwenfit.kernels.triton.gate import silu_mul_reference
from qwenfit.kernels.triton.train_gate import silu_mul
from qwenfit.kernels.triton.train_norm import add_norm, add_norm_reference
from qwenfit.kernels.triton.train_rotary import rotated_heads, rotated_heads_reference, turn

DTYPES = [(torch.float32, 2e-6), (torch.bfloat16, 8e-3)]


def gradients(outputs, inputs, seed: int = 5) -> list[torch.Tensor]:
    """Of the outputs' product with random tensors."""
    total = sum((o.float() * random(*o.shape, seed=seed + i)).sum() for i, o in enumerate(outputs))
    return list(torch.autograd.grad(total, inputs))


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_norm_of_a_sum_and_its_gradients(dtype, bound, residual, weighted):
    def inputs():
        x, r = (random(35, 70, seed=i).to(dtype).requires_grad_() for i in (0, 1))
        weight = (1 + 0.1 * random(70)).to(dtype).requires_grad_(weighted)
        return x, r if residual else None, weight

    one, two = inputs(), inputs()
    got, wanted = add_norm(*one, 1e-6), add_norm_reference(*two, 1e-6)
    for a, b in zip(got, wanted, strict=True):
        assert error(a, b) < bound
    grads = [gradients(out, [t for t in given if t is not None and t.requires_grad])
             for out, given in ((got, one), (wanted, two))]  # fmt: skip
    assert len(grads[0]) == 1 + residual + weighted
    for a, b in zip(*grads, strict=True):
        assert error(a, b) < 2 * bound


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(5, 1, 10), (4, 2, 16), (9, 9, 6)])
def test_heads_out_of_one_product_are_rotated_and_so_are_their_gradients(dtype, bound, heads, kv_heads, width):
    angles = random(7, 1, width // 2)
    cos = torch.cat((angles.cos(), angles.cos()), -1)
    sin = torch.cat((-angles.sin(), angles.sin()), -1)
    one, two = (random(7, (heads + 2 * kv_heads) * width).to(dtype).requires_grad_() for _ in range(2))
    got = rotated_heads(one, cos, sin, heads, kv_heads)
    wanted = rotated_heads_reference(two, cos, sin, heads, kv_heads)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape and error(a, b) < bound
    assert error(gradients(got, one)[0], gradients(wanted, two)[0]) < bound
    out = poisoned(7, heads + 2 * kv_heads, width, dtype=dtype)
    assert turn(*(t.detach() for t in got), cos, sin, -1.0, out=out).isfinite().all()
    assert error(out.flatten(1), one) < 2 * bound


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
def test_the_gate_and_its_gradient(dtype, bound):
    one, two = (random(3, 2 * 1030).to(dtype).requires_grad_() for _ in range(2))
    got, wanted = silu_mul(one), silu_mul_reference(two)
    assert error(got, wanted) < bound
    assert error(gradients([got], one)[0], gradients([wanted], two)[0]) < 2 * bound


@pytest.mark.parametrize("probability", [0.05, 0.5])
def test_dropout_drops_its_share_and_scales_the_rest(probability):
    x = torch.ones(37, 1111, device=DEVICE)
    out = dropout(x, probability, 7, out=poisoned(37, 1111))
    kept = out != 0
    assert abs(float(kept.float().mean()) - (1 - probability)) < 0.01
    assert out[kept].unique().tolist() == pytest.approx([1 / (1 - probability)], rel=1e-4)
    assert torch.equal(out, dropout(x, probability, 7))
    both = float((kept & (dropout(x, probability, 8) != 0)).float().mean())
    assert abs(both - (1 - probability) ** 2) < 0.01  # another seed drops others
    per_column = kept.float().mean(0)
    assert float(per_column.std()) < 1.5 * (probability * (1 - probability) / 37) ** 0.5  # no column is favoured


@pytest.mark.parametrize("shape", [(3, 1030), (2, 70), (5, 4096)])
def test_the_gradient_goes_back_through_the_same_mask(shape):
    x, through, grad = (random(*shape, seed=i) for i in range(3))
    mask = dropout(torch.ones_like(x), 0.3, 11)
    wanted = grad + through * mask
    dropout_backward(x, through, grad, 0.3, 11)
    assert error(grad, wanted) < 1e-6 and error(through, x * mask) < 1e-6
    assert keep_scale(0.3)[1] == pytest.approx(1 / 0.7, rel=1e-4)


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize("vocab", [50, 64, 1000])
def test_logits_become_their_gradient(dtype, bound, vocab, monkeypatch):
    monkeypatch.setattr(loss_module, "_TILE", 64)
    logits = (20 * random(9, vocab)).to(dtype)
    targets = torch.arange(9, device=DEVICE) * (vocab - 1) // 8
    losses, grad = cross_entropy_reference(logits, targets, 3.0)
    got, untouched = poisoned(9), logits.clone()
    cross_entropy(untouched, targets, 3.0, got, needs_grad=False)
    assert torch.equal(untouched, logits) and error(got, losses) < 1e-6
    cross_entropy(logits, targets, 3.0, got, needs_grad=True)
    assert error(got, losses) < 1e-6 and error(logits, grad) < bound


def test_a_logit_that_is_no_number_shows_in_the_loss():
    logits, losses = random(2, 70), poisoned(2)
    logits[0, 69] = torch.nan
    cross_entropy(logits, torch.zeros(2, dtype=torch.int64, device=DEVICE), 1.0, losses, needs_grad=True)
    assert losses[0].isnan() and losses[1].isfinite()


UPDATE = Update(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, decay=0.999, step=3, gradient_scale=0.5)


def test_an_update_in_float32_is_the_reference(monkeypatch):
    monkeypatch.setattr(adamw_module, "_TILE", 64)
    one = [random(333, seed=i) for i in range(3)] + [random(333, seed=3).square()]
    two = [t.clone() for t in one]
    adamw(*one, UPDATE, seed=1)
    adamw_reference(*two, UPDATE)
    assert torch.equal(one[1], two[1])  # the gradient
    for a, b in zip(one, two, strict=True):
        assert error(a, b) < 1e-6


def test_bf16_weights_and_moments_are_rounded_without_a_bias():
    n = 4096
    start = [torch.full((n,), v, device=DEVICE) for v in (1.0, 0.1, 0.02, 0.003)]
    exact = [t.clone() for t in start]
    adamw_reference(*exact, UPDATE)
    narrow = [t.bfloat16() for t in start]
    exact_of = [t.float() for t in narrow]
    adamw_reference(*exact_of, UPDATE)
    adamw(*narrow, UPDATE, seed=4)
    weight, _, first, second = narrow
    for got, wanted in ((weight, exact_of[0]), (second, exact_of[3])):
        assert len(got.unique()) == 2  # the neighbours of the exact value
        unit = float(got.float().max() - got.float().min())
        assert abs(float(got.float().mean()) - float(wanted[0])) < 0.05 * unit
        assert float((got.float() - wanted).abs().max()) < unit
    assert error(first, exact_of[2]) < 8e-3
