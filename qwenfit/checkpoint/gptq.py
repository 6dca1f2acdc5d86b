"""GPTQ and AWQ layers as their packers store them, unpacked to QuantizedWeight.

GPTQ (AutoGPTQ 0.7.1, qlinear_cuda_old.py): qweight int32 [in * bits / 32, out] packs the inputs, lowest bits first;
qzeros int32 [groups, out * bits / 32] packs the outputs; scales [groups, out]; g_idx[i] is the group of input i.
AWQ (AutoAWQ, gemm version): qweight int32 [in, out / 8] and qzeros [groups, out / 8] pack the outputs, each eight of
them in the order 0 2 4 6 1 3 5 7; the stored zero is the true one and there is no g_idx.
"""

from __future__ import annotations

import torch

from qwenfit.config import Quantization
from qwenfit.errors import BadFile
from qwenfit.quantize.types import QuantizedWeight

AWQ_POSITION = (0, 4, 1, 5, 2, 6, 3, 7)  # column c of eight sits at this nibble: the inverse of 0 2 4 6 1 3 5 7


def unpack(name: str, stored: dict[str, torch.Tensor], quantization: Quantization) -> QuantizedWeight:
    """One stored layer of either kind, by the config's method."""
    if quantization.method == "awq":
        return unpack_awq(stored, quantization)
    return unpack_gptq(name, stored, quantization)


def unpack_gptq(name: str, stored: dict[str, torch.Tensor], quantization: Quantization) -> QuantizedWeight:
    """One GPTQ layer: `stored` holds qweight, qzeros, scales and g_idx, of checked shapes and dtypes.

    Act-order (an unsorted g_idx) becomes a permutation of the columns. Raises BadFile when the zero points or g_idx
    are not what the quantization config says.
    """
    bits = quantization.bits
    in_features = stored["g_idx"].numel()
    group_size = in_features if quantization.group_size == -1 else quantization.group_size
    q = _unpack_last(stored["qweight"].t(), bits)  # [out, in]
    zeros = true_zeros(name, _unpack_last(stored["qzeros"], bits), quantization)
    perm = _column_order(name, stored["g_idx"], group_size)
    if perm is not None:
        q = q[:, perm]
    scales = stored["scales"].t().contiguous()
    return QuantizedWeight(bits, group_size, q, scales, zeros.t().to(scales.dtype).contiguous(), perm)


def unpack_awq(stored: dict[str, torch.Tensor], quantization: Quantization) -> QuantizedWeight:
    """One AWQ layer: `stored` holds qweight, qzeros and scales."""
    order = torch.tensor(AWQ_POSITION)

    def columns(packed: torch.Tensor) -> torch.Tensor:
        nibbles = _unpack_last(packed, 4)
        return nibbles.view(nibbles.shape[0], -1, 8)[..., order].flatten(1)

    q = columns(stored["qweight"]).t().contiguous()
    scales = stored["scales"].t().contiguous()
    group_size = q.shape[1] if quantization.group_size == -1 else quantization.group_size
    zeros = columns(stored["qzeros"]).t().to(scales.dtype).contiguous()
    return QuantizedWeight(4, group_size, q, scales, zeros)


def true_zeros(name: str, stored: torch.Tensor, quantization: Quantization) -> torch.Tensor:
    """The zero points that the integers are relative to, from the stored ones.

    AutoGPTQ's format stores zero - 1 (mod 2**bits), `gptq_v2` the zero itself. A symmetric layer tells which by
    value: 7 or 8 in 4 bits, 127 or 128 in 8. An asymmetric one cannot, so there the config's format counts.
    """
    bits, middle = quantization.bits, 2 ** (quantization.bits - 1)
    if quantization.sym:
        low, high = (int(x) for x in stored.aminmax())
        if low != high or low not in (middle - 1, middle):
            raise BadFile(
                f"{name}.qzeros holds zero points {low} to {high}, but a symmetric {bits}-bit layer stores "
                f"{middle - 1} or {middle} throughout."
            )
        return torch.full_like(stored, middle)
    if quantization.checkpoint_format == "gptq_v2":
        return stored
    zeros: torch.Tensor = (stored + 1) & (2**bits - 1)
    return zeros


def concatenate(name: str, parts: list[QuantizedWeight]) -> QuantizedWeight:
    """Several layers on one input as one, their rows in the order given (q, k and v; gate and up).

    They must share the order of their columns: GPTQ gives it to layers quantized on the same inputs, which these are.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    for other in parts[1:]:
        same = first.perm is other.perm is None or (
            first.perm is not None and other.perm is not None and torch.equal(first.perm, other.perm)
        )
        if not same:
            raise BadFile(
                f"{name} was quantized with a different act-order (g_idx) in each of its parts, which cannot be fused.",
                "Use a checkpoint without act-order (desc_act false).",
            )
    return QuantizedWeight(
        first.bits,
        first.group_size,
        torch.cat([part.q for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.zeros for part in parts]),
        first.perm,
    )


def _unpack_last(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, n] -> uint8 [rows, n * 32 / bits], lowest bits first."""
    as_bytes = packed.flatten().view(torch.uint8).view(packed.shape[0], -1)
    if bits == 8:
        return as_bytes
    return torch.stack((as_bytes & 15, as_bytes >> 4), dim=-1).flatten(1)


def _column_order(name: str, g_idx: torch.Tensor, group_size: int) -> torch.Tensor | None:
    """None when the groups lie in order; else the permutation that sorts the columns by group."""
    groups = g_idx.long()
    expected = torch.arange(groups.numel(), device=groups.device) // group_size
    if torch.equal(groups, expected):
        return None
    ordered, perm = torch.sort(groups, stable=True)
    if not torch.equal(ordered, expected):
        raise BadFile(f"{name}.g_idx does not divide its {groups.numel()} inputs into groups of {group_size}.")
    return perm
