"""Linear: y = x W^T + b, with W plain (trainable) or packed in 4 or 8 bits for the kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import torch
from torch import nn

from qwenfit.kernels.linear import PackedWeight, linear, pack, quantized_linear
from qwenfit.quantize.types import QuantizedWeight

if TYPE_CHECKING:
    from qwenfit.kernels.triton.int_matvec import BlockedWeight


class Linear(nn.Module):
    """x [..., in] -> [..., out]. Exactly one of `weight` and `packed` is there."""

    def __init__(
        self, weight: torch.Tensor | None, bias: torch.Tensor | None, packed: PackedWeight | BlockedWeight | None = None
    ) -> None:
        super().__init__()
        self.weight = None if weight is None else nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.packed = packed

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, bias: bool, dtype: torch.dtype, device: torch.device | str
    ) -> Self:
        """Uninitialised weights, for a loader to fill."""
        weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        return cls(weight, torch.empty(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def from_weight(cls, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Self:
        """From a weight [out, in] and a bias [out], which are kept as they are."""
        return cls(weight, bias)

    @classmethod
    def from_quantized(
        cls,
        quantized: QuantizedWeight,
        bias: torch.Tensor | None,
        compute_dtype: torch.dtype,
        device: torch.device | str,
    ) -> Self:
        """From an integer weight, packed into the layout of the kernel that will run on `device`."""
        if bias is not None:
            bias = bias.to(device=device, dtype=compute_dtype)
        return cls(None, bias, pack(quantized, compute_dtype, device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is not None:
            return quantized_linear(x, self.packed, self.bias)
        assert self.weight is not None
        return linear(x, self.weight, self.bias)
