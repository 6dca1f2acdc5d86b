"""Round-to-nearest quantisation: each group of a row gets the scale that spans its range; no data needed."""

from __future__ import annotations

import torch

from qwenfit.quantize.types import QuantizedWeight

_ROWS_AT_ONCE = 1 << 24  # elements; bounds the float32 scratch at 64 MiB whatever the matrix


def quantize_rtn(weight: torch.Tensor, bits: int, group_size: int = 128, sym: bool = True) -> QuantizedWeight:
    """Quantise a weight [out, in] to `bits` (4 or 8) in groups of `group_size` columns (-1: the whole row).

    Symmetric: zero is the middle code 2**(bits-1) and the largest magnitude of a group, with its sign, lands on code 0,
    so that all 2**bits codes are used. Asymmetric: codes 0 .. 2**bits-1 span [min(w, 0), max(w, 0)].
    Scales and zeros are float32. Peak extra memory is a few chunks of 64 MiB beside the result.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, not {bits}")
    out_features, in_features = weight.shape
    group_size = in_features if group_size == -1 else min(group_size, in_features)
    groups = -(-in_features // group_size)
    q = torch.empty(out_features, in_features, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(out_features, groups, device=weight.device)
    zeros = torch.empty_like(scales)
    step = max(1, _ROWS_AT_ONCE // in_features)
    for start in range(0, out_features, step):
        rows = slice(start, start + step)
        q[rows], scales[rows], zeros[rows] = _quantize_rows(weight[rows].float(), bits, group_size, sym)
    return QuantizedWeight(bits, group_size, q, scales, zeros)


def _quantize_rows(
    rows: torch.Tensor, bits: int, group_size: int, sym: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    in_features = rows.shape[1]
    padding = -in_features % group_size
    grouped = torch.nn.functional.pad(rows, (0, padding)).view(len(rows), -1, group_size)  # [rows, groups, group_size]
    low, high, top = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0), 2**bits - 1
    if sym:
        extreme = torch.where(high > -low, high, low)
        scales = extreme / -(2.0 ** (bits - 1))
        scales = torch.where(scales == 0, 1.0, scales)
        zeros = torch.full_like(scales, 2.0 ** (bits - 1))
    else:
        scales = (high - low) / top
        scales = torch.where(scales == 0, 1.0, scales)
        zeros = (-low / scales).round().clamp(0, top)
    codes = (grouped / scales[..., None]).round_().add_(zeros[..., None]).clamp_(0, top)
    return codes.flatten(1)[:, :in_features].to(torch.uint8), scales, zeros
