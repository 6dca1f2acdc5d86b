"""Matrix products with plain (float32, float16, bfloat16) and packed (int8, int4) weights.

The reference of each operation stands first; choice.py decides which fast path a call takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear as torch_linear

from qwenfit.kernels import native
from qwenfit.kernels.choice import KINDS, KernelChoice, choose_kernel, onednn_bf16
from qwenfit.kernels.packed import (
    PackedWeight,
    dequantize,
    int4pack_product,
    native_weight,
    pack,
    row_pieces,
    unpacked_pieces,
)
from qwenfit.quantize.types import QuantizedWeight

if TYPE_CHECKING:
    from qwenfit.kernels.triton.int_matvec import BlockedWeight

__all__ = [
    "KernelChoice",
    "PackedWeight",
    "choose_kernel",
    "dequantize",
    "linear",
    "linear_reference",
    "pack",
    "quantized_linear",
    "quantized_linear_reference",
]

# Plain weights


def linear_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in] @ weight [out, in].T + bias [out], in float32, rounded to x's dtype once."""
    result = x.float() @ weight.float().T
    return (result if bias is None else result + bias.float()).to(x.dtype)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in], weight [out, in], bias [out] -> [..., out] of x's dtype.

    On a CPU x may be float32 whatever the weight's dtype: the result then is exact to float32, as logits want it.
    With gradients enabled this is torch's own function.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or not weight.is_contiguous() or x.numel() == 0:
        return torch_linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    name = choose_kernel(KINDS[weight.dtype], x.dtype, flat.shape[0], "cpu").name
    if name == "torch":
        return torch_linear(x, weight, bias)
    if bias is not None:
        bias = bias.to(x.dtype)
    return _PLAIN[name](weight, flat, bias).view(*x.shape[:-1], -1)


def _linear_widened(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    pieces = ((rows, weight[rows].float()) for rows in row_pieces(*weight.shape))
    return _by_pieces(pieces, weight.shape[0], x, bias, torch.float32)


_PLAIN = {
    "native gemv": native.bf16_gemv,
    "native tiles": native.bf16_tiles,
    "native gemm": native.bf16_gemm,
    "widen": _linear_widened,
}


def _by_pieces(
    pieces: Iterable[tuple[slice, torch.Tensor]],
    out_features: int,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """x [rows, in] times a weight that comes as (output rows, weight of `dtype`), one piece after the other."""
    result = x.new_empty(x.shape[0], out_features)
    x = x.to(dtype)
    for rows, weight in pieces:
        result[:, rows] = torch_linear(x, weight, None if bias is None else bias[rows].to(dtype))
    return result


# Packed weights


def quantized_linear_reference(
    x: torch.Tensor, quantized: QuantizedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., in] times the dequantised weight in float32, rounded to x's dtype once."""
    return linear_reference(x, quantized.dequantize(torch.float32), bias)


def quantized_linear(
    x: torch.Tensor, packed: PackedWeight | BlockedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x [..., in] -> [..., out] of x's dtype; bias [out]. No gradients flow through it."""
    if not isinstance(packed, PackedWeight):
        from qwenfit.kernels.triton.product import product

        rows = x.reshape(-1, packed.in_features).contiguous()
        return product(rows, packed, bias).view(*x.shape[:-1], packed.out_features)
    # A decoding step comes here a hundred times: tensor calls that would change nothing are skipped.
    flat = x if x.dim() == 2 else x.reshape(-1, packed.in_features)
    if packed.perm is not None:
        flat = flat.index_select(1, packed.perm)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    result = _LAYOUTS[packed.layout](flat, packed, bias)
    return result if x.dim() == 2 else result.view(*x.shape[:-1], packed.out_features)


def _linear_interleaved(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    if x.dtype not in native.DTYPES:
        return _linear_interleaved(x.float(), packed, None if bias is None else bias.float()).to(x.dtype)
    name = choose_kernel(f"int{packed.bits}", x.dtype, x.shape[0], "cpu").name
    if name == "unpack":
        return _linear_rows(x, packed, bias)
    return _PACKED[name](packed.bits, native_weight(packed), x, bias)


_PACKED = {
    "native gemv": native.packed_gemv,
    "native tiles": native.packed_tiles,
    "native gemm": native.packed_gemm,
}


def _linear_int4pack(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    result = int4pack_product(x, packed).to(x.dtype)
    return result if bias is None else result + bias


def _linear_rows(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    narrow = x.device.type != "cpu" or (x.dtype == torch.bfloat16 and onednn_bf16())
    dtype = x.dtype if narrow else torch.float32
    return _by_pieces(unpacked_pieces(packed, dtype), packed.out_features, x, bias, dtype)


_LAYOUTS = {"interleaved": _linear_interleaved, "int4pack": _linear_int4pack, "rows": _linear_rows}
