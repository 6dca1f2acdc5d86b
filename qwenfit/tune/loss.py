"""Cross entropy straight from hidden states: the logits of a few hundred tokens at a time, never of a whole batch.

The gradient of softmax cross entropy is known as soon as the logits are: (softmax - one-hot) / divisor. So each
chunk's logits become their gradient in place, and the gradients of hidden states and head are made in the forward
pass; the backward pass only scales them. (The idea is Liger-Kernel's fused linear cross entropy, arXiv 2410.10989.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from qwenfit.planning.finetune_memory import LOSS_CHUNK_BYTES


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    divisor: float,
    *,
    sink: Tensor | None = None,
    rows: Tensor | None = None,
    row_ids: Tensor | None = None,
) -> Tensor:
    """sum over tokens of -log softmax(hidden @ weight.T)[target], over `divisor`: float32 scalar.

    hidden [tokens, hidden_size] of the trained positions only; weight [vocab, hidden_size]; targets int64 [tokens].
    divisor: the trained tokens of the whole accumulated step, so that micro-batches add up.
    weight gets a gradient when it requires one; with `sink`, float32 like weight, that gradient is added there instead
    in this call. `rows` [n, hidden_size], trained copies of the weight's rows `row_ids` int64 [n], get theirs.
    """
    loss: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, divisor, sink, rows, row_ids
    )
    return loss


def chunk_tokens(vocab_size: int, dtype: torch.dtype, fused: bool) -> int:
    """Tokens whose logits take LOSS_CHUNK_BYTES; in a 16-bit type, unless `fused`, with a float32 copy."""
    bytes_each = dtype.itemsize if fused or dtype == torch.float32 else 4 + dtype.itemsize
    tokens = max(1, LOSS_CHUNK_BYTES // (vocab_size * bytes_each))
    return tokens // 128 * 128 if fused and tokens > 128 else tokens  # whole tiles of the matrix product


def fusible(device: torch.device) -> bool:
    """Whether logits become their gradient in one kernel: on a GPU."""
    return device.type == "cuda"


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        divisor: float,
        sink: Tensor | None,
        rows: Tensor | None,
        row_ids: Tensor | None,
    ) -> Tensor:
        needs_hidden, needs_weight, _, _, _, needs_rows, _ = ctx.needs_input_grad
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight) if needs_weight and sink is None else None
        grad_rows = torch.zeros_like(rows) if needs_rows and rows is not None else None
        fused = fusible(hidden.device)
        step = chunk_tokens(weight.shape[0], hidden.dtype, fused)
        for start in range(0, len(hidden), step):
            part = slice(start, start + step)
            x = hidden[part]
            value_and_grad = _fused_chunk if fused else _chunk
            value, grad = value_and_grad(linear(x, weight), targets[part], divisor, any(ctx.needs_input_grad))
            loss += value
            if grad is None:
                continue
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[part])
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, x)
            elif needs_weight and sink is not None:
                _add_product(sink, grad.T, x)
            if grad_rows is not None and row_ids is not None:
                grad_rows += (grad[:, row_ids].T @ x).to(grad_rows.dtype)
            del grad  # before the next chunk's logits are made
        ctx.grads = (grad_hidden, grad_weight, grad_rows)
        return loss / divisor

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (scale,) = grad_outputs
        hidden, weight, rows = (None if g is None else g.mul_(scale.to(g.dtype)) for g in ctx.grads)
        ctx.grads = ()
        return hidden, weight, None, None, None, rows, None


def _chunk(logits: Tensor, targets: Tensor, divisor: float, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """(sum of the rows' losses, gradient of that sum / divisor with respect to the logits, of their dtype)."""
    dtype, target = logits.dtype, targets[:, None]
    logits = logits.float()
    logits -= logits.amax(1, keepdim=True)
    loss = -logits.gather(1, target).sum()
    total = logits.exp_().sum(1, keepdim=True)
    loss += total.log().sum()
    if not needs_grad:
        return loss, None
    grad = logits.div_(total)
    grad.scatter_add_(1, target, grad.new_full((1, 1), -1.0).expand_as(target))
    return loss, grad.div_(divisor).to(dtype)


def _fused_chunk(logits: Tensor, targets: Tensor, divisor: float, needs_grad: bool) -> tuple[Tensor, Tensor | None]:
    """As `_chunk`; the gradient takes the logits' place."""
    from qwenfit.kernels.triton.cross_entropy import cross_entropy

    losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    cross_entropy(logits, targets, divisor, losses, needs_grad)
    return losses.sum(), logits if needs_grad else None


def _add_product(sink: Tensor, a: Tensor, b: Tensor) -> None:
    """sink (float32) += a @ b, kept in float32 throughout where the device can multiply 16-bit into float32."""
    if a.dtype == torch.float32:
        sink.addmm_(a, b)
    elif sink.is_cuda:
        torch.addmm(sink, a, b, out_dtype=torch.float32, out=sink)
    else:
        sink += a @ b
