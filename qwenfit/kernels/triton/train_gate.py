"""SwiGLU's gate with its gradient, which takes the place of the gate's input."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenfit.kernels.triton.gate import silu_mul as silu_mul_forward
from qwenfit.kernels.triton.launch import FUSED_SUMS

_TILE = 1024


def silu_mul(gate_up: Tensor) -> Tensor:
    """`gate.silu_mul_reference`, differentiable: contiguous [tokens, 2 width], the gate first -> [tokens, width].

    The backward pass overwrites gate_up, so nothing else may need its values.
    """
    out: Tensor = _SiluMul.apply(gate_up)
    return out


class _SiluMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return silu_mul_forward(gate_up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        return silu_mul_backward(gate_up, grad_outputs[0].contiguous())


def silu_mul_backward(gate_up: Tensor, grad: Tensor) -> Tensor:
    """gate_up [tokens, 2 width] becomes the gradient of itself, from that of the result [tokens, width]."""
    tokens, width = grad.shape
    _backward[(tokens, triton.cdiv(width, _TILE))](gate_up, grad, WIDTH=width, TILE=_TILE, **FUSED_SUMS)
    return gate_up


@triton.jit
def _backward(gate_up_ptr, grad_ptr, WIDTH: tl.constexpr, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = i < WIDTH
    gate_at = gate_up_ptr + row * 2 * WIDTH + i
    gate = tl.load(gate_at, mask=here, other=0.0).to(tl.float32)
    up = tl.load(gate_at + WIDTH, mask=here, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * WIDTH + i, mask=here, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    silu = gate * share
    dtype = gate_up_ptr.dtype.element_ty
    tl.store(gate_at, (grad * up * (share + silu * (1 - share))).to(dtype), mask=here)
    tl.store(gate_at + WIDTH, (grad * silu).to(dtype), mask=here)
