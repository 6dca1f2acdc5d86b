"""Products with frozen int4 and int8 weights that gradients flow through, for Q-LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from qwenfit.kernels.packed import PackedWeight, dequantize

if TYPE_CHECKING:
    from qwenfit.kernels.triton.int_matvec import BlockedWeight


def frozen_quantized_linear(x: Tensor, packed: PackedWeight | BlockedWeight, bias: Tensor | None) -> Tensor:
    """x [..., in] -> [..., out]; only x gets a gradient.

    The weight is dequantised to x's dtype for the product and again for its gradient, and kept by neither pass: one
    layer's 16-bit copy is alive at a time.
    """
    out: Tensor = _FrozenQuantizedLinear.apply(x, packed)  # type: ignore[no-untyped-call]
    return out if bias is None else out + bias


class _FrozenQuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: PackedWeight | BlockedWeight) -> Tensor:
        ctx.packed = packed
        return linear(x, dequantize(packed, x.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        return grad @ dequantize(ctx.packed, grad.dtype), None
