"""One AdamW update (arXiv 1711.05101) of flat tensors in one kernel: every value is read once and written once."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from qwenfit.kernels.triton.launch import FUSED_SUMS

_TILE = 1024


@dataclass(frozen=True)
class Update:
    """The scalars of one update. gradient_scale: clipping; decay: what a weight is multiplied by first."""

    lr: float
    betas: tuple[float, float]
    eps: float
    decay: float
    step: int  # from 1
    gradient_scale: float = 1.0


def adamw_reference(weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, update: Update) -> None:
    """float32 weight [n] and moments [n] are updated in place by grad [n]."""
    beta1, beta2 = update.betas
    grad = grad.float() * update.gradient_scale
    first.lerp_(grad, 1 - beta1)
    second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    weight.mul_(update.decay)
    denominator = (second / (1 - beta2**update.step)).sqrt_().add_(update.eps)
    weight.addcdiv_(first, denominator, value=-update.lr / (1 - beta1**update.step))


def adamw(weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, update: Update, seed: int) -> None:
    """`adamw_reference` for contiguous tensors of any of float32 and bfloat16 each.

    A bfloat16 weight or second moment is rounded stochastically by draws from `seed`, as `round_stochastically` does.
    """
    n = weight.numel()
    beta1, beta2 = update.betas
    _adamw[(triton.cdiv(n, _TILE),)](
        weight, grad, first, second, n, seed, update.gradient_scale, 1 - beta1, beta2, 1 - beta2, update.eps,
        update.decay, 1 / (1 - beta2**update.step), update.lr / (1 - beta1**update.step), TILE=_TILE, num_warps=4,
        **FUSED_SUMS,
    )  # fmt: skip


@triton.jit
def _stochastic(value, noise):
    """float32 -> bfloat16: 16 random bits are added below what is kept, and the rest is cut off."""
    bits = value.to(tl.int32, bitcast=True) + (noise & 0xFFFF).to(tl.int32)
    return (bits & -65536).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit(do_not_specialize=["n", "seed"])
def _adamw(
    weight_ptr, grad_ptr, first_ptr, second_ptr, n, seed, gradient_scale, new1, beta2, new2, eps, decay,
    correction2, step_size, TILE: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = at < n
    grad = tl.load(grad_ptr + at, mask=here, other=0.0).to(tl.float32) * gradient_scale
    first = tl.load(first_ptr + at, mask=here, other=0.0).to(tl.float32)
    second = tl.load(second_ptr + at, mask=here, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + at, mask=here, other=0.0).to(tl.float32)
    first += new1 * (grad - first)
    second = second * beta2 + new2 * grad * grad
    weight = weight * decay - step_size * first / (tl.sqrt(second * correction2) + eps)
    noise = tl.randint(seed, at.to(tl.int32), n_rounds=7)
    tl.store(first_ptr + at, first.to(first_ptr.dtype.element_ty), mask=here)
    if second_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(second_ptr + at, _stochastic(second, noise), mask=here)
    else:
        tl.store(second_ptr + at, second, mask=here)
    if weight_ptr.dtype.element_ty == tl.bfloat16:
        tl.store(weight_ptr + at, _stochastic(weight, noise >> 16), mask=here)
    else:
        tl.store(weight_ptr + at, weight, mask=here)
