"""Products of 16-bit tensors whose results are float32 and were never rounded to less."""

from __future__ import annotations

import torch


def add_product(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """total [rows, out] += x [rows, in] @ weight [out, in].T, rounded once to total's dtype; returns total."""
    if total.dtype == x.dtype:
        return total.addmm_(x, weight.T)
    if total.is_cuda:
        summed: torch.Tensor = torch.ops.aten.addmm.dtype_out(total, x, weight.T, total.dtype, out=total)
        return summed
    return total.add_(x.to(total.dtype) @ weight.T.to(total.dtype))


def wide_product(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """float32 x [rows, in] @ weight [out, in].T, in `out` if given."""
    if x.dtype == torch.float32:
        return torch.mm(x, weight.T, out=out)
    if x.is_cuda:
        out = x.new_empty(len(x), len(weight), dtype=torch.float32) if out is None else out
        wide: torch.Tensor = torch.ops.aten.mm.dtype_out(x, weight.T, torch.float32, out=out)
        return wide
    return torch.mm(x.float(), weight.T.float(), out=out)
