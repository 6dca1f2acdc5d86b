"""The chunked loss is cross entropy of the whole logits, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from qwenfit.tune import loss as module
from qwenfit.tune.loss import linear_cross_entropy

TOKENS, HIDDEN, VOCAB = 37, 16, 50


@pytest.fixture(params=[1, 8, 1000], ids=lambda n: f"{n} tokens a chunk")
def chunks(request, monkeypatch):
    monkeypatch.setattr(module, "chunk_tokens", lambda vocab, dtype, fused: request.param)


def tensors(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, VOCAB, (TOKENS,), generator=generator)


def test_value_and_gradients_are_those_of_the_whole_logits(chunks):
    hidden, weight, targets = tensors()
    wanted = cross_entropy(hidden @ weight.T, targets, reduction="sum") / 123
    (wanted * 3).backward()
    grads = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    got = linear_cross_entropy(hidden, weight, targets, 123)
    (got * 3).backward()
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(hidden.grad, grads[0])
    torch.testing.assert_close(weight.grad, grads[1])


def test_a_frozen_head_gets_no_gradient_and_a_sink_gets_the_heads(chunks):
    hidden, weight, targets = tensors()
    cross_entropy(hidden @ weight.T, targets, reduction="mean").backward()
    sink = torch.ones_like(weight)
    wanted, weight.grad = weight.grad, None
    linear_cross_entropy(hidden, weight, targets, TOKENS, sink=sink).backward()
    assert weight.grad is None
    torch.testing.assert_close(sink - 1, wanted, atol=1e-6, rtol=1e-4)
    linear_cross_entropy(hidden, weight.detach(), targets, TOKENS).backward()
    assert weight.grad is None


def test_trained_rows_of_the_head_get_their_part_of_its_gradient(chunks):
    hidden, weight, targets = tensors()
    cross_entropy(hidden @ weight.T, targets).backward()
    ids = torch.tensor([0, 7, 49])
    rows = weight.detach()[ids].clone().requires_grad_()
    linear_cross_entropy(hidden, weight.detach(), targets, TOKENS, rows=rows, row_ids=ids).backward()
    torch.testing.assert_close(rows.grad, weight.grad[ids])


def test_in_bf16_the_loss_is_that_of_float32_logits(chunks):
    hidden, weight, targets = tensors(torch.bfloat16)
    wanted = cross_entropy((hidden @ weight.T).float(), targets)
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets, TOKENS), wanted)


def test_logits_of_any_size_neither_overflow_nor_vanish():
    hidden, weight, targets = tensors()
    with torch.no_grad():
        hidden *= 1e4
    got = linear_cross_entropy(hidden, weight, targets, TOKENS)
    got.backward()
    torch.testing.assert_close(got, cross_entropy(hidden @ weight.T, targets))
    assert hidden.grad.isfinite().all()


def test_a_batch_without_trained_tokens_has_loss_zero_and_no_gradient():
    hidden, weight, targets = tensors()
    loss = linear_cross_entropy(hidden[:0], weight, targets[:0], 1)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not weight.grad.any()


def test_the_logits_of_a_batch_never_exist_as_a_whole(monkeypatch):
    """152k rows: the largest tensor made is one chunk, whatever the number of tokens."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.nbytes)
            return out

    monkeypatch.setattr(module, "LOSS_CHUNK_BYTES", 1 << 20)
    hidden, weight = torch.randn(64, 4, requires_grad=True), torch.randn(151_936, 4)
    with Watch():
        linear_cross_entropy(hidden, weight, torch.zeros(64, dtype=torch.long), 64).backward()
    assert largest <= weight.nbytes < 64 * 151_936 * 4 / 10
