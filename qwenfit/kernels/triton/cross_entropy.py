"""Softmax cross entropy of rows of logits, which become their own gradient: each is read twice and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenfit.kernels.triton.launch import FUSED_SUMS

_TILE = 4096


def cross_entropy_reference(logits: Tensor, targets: Tensor, divisor: float) -> tuple[Tensor, Tensor]:
    """(float32 losses -log softmax(logits)[target] [rows], gradient of their sum / divisor [rows, vocab])."""
    wide = logits.float()
    losses = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
    grad = wide.softmax(1)
    grad[torch.arange(len(targets), device=targets.device), targets] -= 1
    return losses, (grad / divisor).to(logits.dtype)


def cross_entropy(logits: Tensor, targets: Tensor, divisor: float, losses: Tensor, needs_grad: bool) -> None:
    """`cross_entropy_reference` in place: contiguous logits [rows, vocab] become the gradient, if it is needed.

    targets int64 [rows]; losses float32 [rows] are written.
    """
    rows, vocab = logits.shape
    tile = min(_TILE, triton.next_power_of_2(vocab))
    _cross_entropy[(rows,)](
        logits, targets, losses, vocab, 1.0 / divisor, TILE=tile, NEEDS_GRAD=needs_grad, num_warps=max(1, tile // 512),
        **FUSED_SUMS,
    )  # fmt: skip


@triton.jit
def _cross_entropy(
    logits_ptr, targets_ptr, losses_ptr, vocab, scale, TILE: tl.constexpr, NEEDS_GRAD: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    at = logits_ptr + row.to(tl.int64) * vocab
    i = tl.arange(0, TILE)
    # A running maximum and sum for each lane: they meet once, after the loop.
    largest = tl.full([TILE], -float("inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    for start in range(0, vocab, TILE):
        x = tl.load(at + start + i, mask=start + i < vocab, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(largest, x)
        # Nothing but -inf so far: exp(-inf - -inf) would be NaN.
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(largest - safe) + tl.exp(x - safe)
        largest = higher
    top = tl.max(largest, axis=0)
    log_sum = tl.log(tl.sum(total * tl.exp(largest - top), axis=0)) + top
    target = tl.load(targets_ptr + row)
    tl.store(losses_ptr + row, log_sum - tl.load(at + target).to(tl.float32))
    if NEEDS_GRAD:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        for start in range(0, vocab, TILE):
            x = tl.load(at + start + i, mask=start + i < vocab, other=0.0).to(tl.float32)
            grad = (tl.exp(x - log_sum) - tl.where(start + i == target, 1.0, 0.0)) * scale
            tl.store(at + start + i, grad.to(logits_ptr.dtype.element_ty), mask=start + i < vocab)
