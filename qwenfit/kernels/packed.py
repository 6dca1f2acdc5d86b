"""PackedWeight: int8 and int4 weights in the layout of the kernels that read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from qwenfit.kernels import native
from qwenfit.kernels.choice import choose_kernel
from qwenfit.quantize.types import QuantizedWeight

if TYPE_CHECKING:
    from qwenfit.kernels.triton.int_matvec import BlockedWeight

_PIECE = 1 << 22  # weights handled at once where a wider copy is needed: 16 MiB of float32
_INT4PACK_GROUPS = (256, 128, 64, 32)


@dataclass
class PackedWeight:
    """A QuantizedWeight in the layout of the kernels that will read it."""

    bits: int
    group_size: int  # as the layout has it: a divisor of the original, or padded to whole words
    out_features: int
    in_features: int
    layout: str  # "interleaved" (packed.h) | "int4pack" (torch's CPU kernel) | "rows" (codes in row order)
    codes: torch.Tensor  # int32 [blocks, words, 16] | uint8, torch's own | uint8 [out, in or in/2]
    scales: torch.Tensor  # [blocks, groups, 16] | bf16 [groups, out, 2] with offsets | [out, groups]
    zeros: torch.Tensor | None = None  # shaped like scales; None: the middle code throughout (int4pack: within scales)
    perm: torch.Tensor | None = None  # int64 [in]

    @property
    def nbytes(self) -> int:
        tensors = (self.codes, self.scales, self.zeros, self.perm)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def pack(
    quantized: QuantizedWeight, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> PackedWeight | BlockedWeight:
    """Lay a weight out for the kernels that `choose_kernel` takes for activations of `dtype` on `device`."""
    device = torch.device(device)
    kernel = choose_kernel(f"int{quantized.bits}", dtype, 1, device.type).name
    if kernel == "triton matvec":
        from qwenfit.kernels.triton.int_matvec import pack_blocked

        if (blocked := pack_blocked(quantized, dtype, device)) is not None:
            return blocked
    if kernel == "native gemv" and (group := _padded_group(quantized, 32 // quantized.bits)):
        packed = _pack_interleaved(quantized, group)
    elif kernel == "int4pack" and (group := _padded_group(quantized, 32)):
        packed = _pack_int4pack(quantized, group)
    else:
        packed = _pack_rows(quantized)
    for name in ("codes", "scales", "zeros", "perm"):
        if (tensor := getattr(packed, name)) is not None:
            setattr(packed, name, tensor.to(device))
    return packed


def dequantize(packed: PackedWeight | BlockedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [out, in], its columns in the order of the input."""
    if not isinstance(packed, PackedWeight):
        from qwenfit.kernels.triton.dequantise import dequantised

        stored = dequantised(packed, dtype)
        return stored if packed.perm is None else torch.empty_like(stored).index_copy_(1, packed.perm, stored)
    if packed.layout == "interleaved" and dtype in native.DTYPES:
        weight = native.unpack(packed.bits, native_weight(packed), packed.in_features, dtype)
    else:
        weight = torch.cat([piece.to(dtype) for _, piece in unpacked_pieces(packed, torch.float32)])
    if packed.perm is not None:
        weight = torch.empty_like(weight).index_copy_(1, packed.perm, weight)
    return weight


def int4pack_product(x: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    """x [rows, in] times an "int4pack" weight -> bfloat16 [rows, out]; torch's kernel takes bfloat16 only."""
    padded = packed.scales.shape[0] * packed.group_size
    half = pad(x, (0, padded - packed.in_features)).to(torch.bfloat16).contiguous()
    product: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
        half, packed.codes, packed.group_size, packed.scales
    )
    return product[:, : packed.out_features]


def row_pieces(out_features: int, in_features: int) -> Iterator[slice]:
    step = max(native.ROWS, _PIECE // in_features // native.ROWS * native.ROWS)
    for start in range(0, out_features, step):
        yield slice(start, min(start + step, out_features))


def _padded_group(quantized: QuantizedWeight, multiple: int) -> int:
    """The group size if it is the multiple the layout needs; padded up to one if a row is a single group; else 0."""
    if quantized.group_size >= quantized.in_features:
        return -(-quantized.in_features // multiple) * multiple
    return quantized.group_size if quantized.group_size % multiple == 0 else 0


def _zeros_or_none(quantized: QuantizedWeight) -> torch.Tensor | None:
    return None if bool((quantized.zeros == 2 ** (quantized.bits - 1)).all()) else quantized.zeros.float()


def _pack_interleaved(quantized: QuantizedWeight, group: int) -> PackedWeight:
    """packed.h's layout. Rows are padded to blocks of 16, inputs to whole groups; padded rows have scale 0."""
    bits, (out_features, in_features), per_word = quantized.bits, quantized.q.shape, 32 // quantized.bits
    groups = quantized.scales.shape[1]
    blocks, words = -(-out_features // native.ROWS), groups * group // per_word
    codes = torch.empty(blocks, words, native.ROWS, dtype=torch.int32)
    for rows in row_pieces(blocks * native.ROWS, in_features):
        q = quantized.q[rows]
        q = pad(q, (0, groups * group - in_features, 0, rows.stop - rows.start - q.shape[0]))
        q = q.view(-1, native.ROWS, words, per_word).to(torch.int32)  # [blocks, 16, words, codes of a word]
        word = q[..., 0].clone()
        for position in range(1, per_word):
            word |= q[..., position] << bits * position
        codes[rows.start // native.ROWS : rows.stop // native.ROWS] = word.transpose(1, 2)

    def by_block(tensor: torch.Tensor) -> torch.Tensor:
        padded = pad(tensor.float(), (0, 0, 0, blocks * native.ROWS - out_features))
        return padded.view(blocks, native.ROWS, groups).transpose(1, 2).contiguous()

    zeros = _zeros_or_none(quantized)
    return PackedWeight(
        bits,
        group,
        out_features,
        in_features,
        "interleaved",
        codes,
        by_block(quantized.scales),
        None if zeros is None else by_block(zeros),
        quantized.perm,
    )


def _pack_int4pack(quantized: QuantizedWeight, group: int) -> PackedWeight:
    """torch's kernel computes (q - 8) * scale + offset, both bf16, in groups of 32 to 256."""
    out_features, in_features = quantized.q.shape
    padded_out, padded_in = -(-out_features // 16) * 16, quantized.scales.shape[1] * group
    kernel_group = next(size for size in _INT4PACK_GROUPS if group % size == 0)
    q = pad(quantized.q, (0, padded_in - in_features, 0, padded_out - out_features))
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
    offsets = quantized.scales.float() * (8 - quantized.zeros.float())
    scales = torch.stack([quantized.scales.float(), offsets], dim=-1)  # [out, groups, 2]
    scales = pad(scales, (0, 0, 0, 0, 0, padded_out - out_features)).repeat_interleave(group // kernel_group, dim=1)
    scales = scales.transpose(0, 1).to(torch.bfloat16).contiguous()
    return PackedWeight(4, kernel_group, out_features, in_features, "int4pack", codes, scales, None, quantized.perm)


def _pack_rows(quantized: QuantizedWeight) -> PackedWeight:
    out_features, in_features = quantized.q.shape
    codes = quantized.q
    if quantized.bits == 4:
        even = pad(codes, (0, in_features % 2))
        codes = even[:, 0::2] | even[:, 1::2] << 4
    zeros = _zeros_or_none(quantized)
    scales = quantized.scales.float()
    return PackedWeight(
        quantized.bits, quantized.group_size, out_features, in_features, "rows", codes, scales, zeros, quantized.perm
    )


def native_weight(packed: PackedWeight, rows: slice | None = None) -> native.Weight:
    codes, scales, zeros, out_features = packed.codes, packed.scales, packed.zeros, packed.out_features
    if rows is not None:
        blocks = slice(rows.start // native.ROWS, -(-rows.stop // native.ROWS))
        codes, scales, zeros = codes[blocks], scales[blocks], None if zeros is None else zeros[blocks]
        out_features = rows.stop - rows.start
    padded = scales.shape[1] * packed.group_size
    pointer = None if zeros is None else zeros.data_ptr()
    return native.Weight(codes.data_ptr(), scales.data_ptr(), pointer, out_features, padded, packed.group_size)


def unpacked_pieces(packed: PackedWeight, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """(output rows, weight [rows, in] of `dtype`), columns in stored order."""
    if packed.layout == "int4pack":
        identity = torch.eye(packed.in_features, dtype=torch.bfloat16)
        yield slice(0, packed.out_features), int4pack_product(identity, packed).T.to(dtype)
        return
    for rows in row_pieces(packed.out_features, packed.in_features):
        if packed.layout == "interleaved":
            yield rows, native.unpack(packed.bits, native_weight(packed, rows), packed.in_features, dtype)
        else:
            yield rows, _unpack_rows(packed, rows).to(dtype)


def _unpack_rows(packed: PackedWeight, rows: slice) -> torch.Tensor:
    codes = packed.codes[rows]
    if packed.bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)[:, : packed.in_features]
    zeros = torch.full_like(packed.scales[rows], 2 ** (packed.bits - 1)) if packed.zeros is None else packed.zeros[rows]
    return QuantizedWeight(packed.bits, packed.group_size, codes, packed.scales[rows], zeros).dequantize()
