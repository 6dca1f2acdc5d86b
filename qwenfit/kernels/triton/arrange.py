"""Activations as int_matmul.py multiplies them with codes: in the order in which a weight stores its columns.

As integers for some rows, of which the tensor cores take twice as many bytes as bfloat16; as they are for many rows,
where two products of bytes would take as long as one of bfloat16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.gate import silu_mul_reference
from qwenfit.kernels.triton.int_matvec import BlockedWeight, normalised
from qwenfit.kernels.triton.launch import options, start_after_previous

BESIDE_ROWS = 64  # beyond, it is faster when it begins after the product before it, as attention is
LARGEST = 32639  # 127 * 256 + 127: both bytes of an integer stay signed ones


@dataclass
class Arranged:
    """x [rows, in] in stored order, padded to blocks: integers of 16 bits that share a unit in a block, or as it is."""

    # int8 [2, rows, padded]: high bytes, then low ones, both signed; or [1, rows, padded] of the model's dtype; or as
    # the lanes of a warp read it, int8 [blocks, 2, halves of bytes, 32 lanes, bytes]
    values: torch.Tensor
    units: torch.Tensor  # float32 [2, blocks, rows]: the unit (1 without integers), and the sum of the block's x

    @property
    def rows(self) -> int:
        return self.units.shape[2]

    @property
    def integers(self) -> bool:
        return self.values.dtype == torch.int8


def stored_order(bits: int, block: int) -> torch.Tensor:
    """int64 [block]: the column that stands at each place. For int4 those of a byte's low halves, then the high."""
    place = torch.arange(block)
    if bits == 8:
        return place % 4 * (block // 4) + place // 4
    half, byte = place // (block // 2), place % (block // 2)
    return (2 * (byte % 4) + half) * (block // 8) + byte // 4


def arrange_reference(
    x: torch.Tensor,
    weight: BlockedWeight,
    norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    gated: bool = False,
    integers: bool = True,
) -> Arranged:
    """RMSNorm of x [rows, in] if `norm` [in] is given; or silu(first half) * second half of x [rows, 2 in] if gated."""
    dtype = _narrow(x, norm)
    x = silu_mul_reference(x.float()) if gated else normalised(x, norm, eps)
    if weight.perm is not None:
        x = x[:, weight.perm]
    blocks = -(-weight.in_features // weight.block)
    x = torch.nn.functional.pad(x, (0, blocks * weight.block - weight.in_features)).view(len(x), blocks, weight.block)
    x = x[:, :, stored_order(weight.bits, weight.block).to(x.device)]
    if not integers:
        x = x.to(dtype)
        units = torch.stack((torch.ones_like(x[..., 0]).float(), x.float().sum(-1)))
        return Arranged(x.flatten(1)[None], units.transpose(1, 2).contiguous())
    unit = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / LARGEST
    whole = (x / unit).round().int()
    low = ((whole + 128) & 255) - 128
    planes = torch.stack((whole - low >> 8, low)).to(torch.int8).flatten(2)
    units = torch.stack((unit[..., 0], whole.sum(-1) * unit[..., 0])).transpose(1, 2).contiguous()
    return Arranged(planes, units)


def arrange(
    x: torch.Tensor,
    weight: BlockedWeight,
    norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    gated: bool = False,
    integers: bool = True,
    lanes: bool = False,
) -> Arranged:
    """`arrange_reference` in one kernel; x is contiguous. Of `weight` only the layout counts.

    With `lanes` the integers of at most 8 rows stand as int_lanes.py reads them; what belongs to no row is anything.
    """
    rows, blocks = x.shape[0], -(-weight.in_features // weight.block)
    shape: tuple[int, ...] = (2 if integers else 1, rows, blocks * weight.block)
    if lanes:
        shape = (blocks, 2, 2, 32, weight.block // 8)
    dtype = torch.int8 if integers else _narrow(x, norm)
    values = torch.empty(shape, dtype=dtype, device=x.device)
    units = torch.empty(2, blocks, rows, dtype=torch.float32, device=x.device)
    tile = 4 if rows <= 8 else 16  # blocks of a program
    _arrange[(rows, triton.cdiv(blocks, tile))](
        x, norm, weight.perm, values, units, rows, eps,
        IN=weight.in_features, BLOCKS=blocks, BLOCK=weight.block, BITS=weight.bits, LARGEST=LARGEST, TILE=tile,
        WIDTH=triton.next_power_of_2(weight.in_features), HAS_NORM=norm is not None,
        HAS_PERM=weight.perm is not None, GATED=gated, INTEGERS=integers, LANES=lanes, num_warps=4,
        **options(x, beside=rows <= BESIDE_ROWS),
    )  # fmt: skip
    return Arranged(values, units)


def _narrow(x: torch.Tensor, norm: torch.Tensor | None) -> torch.dtype:
    """The model's dtype: before a norm x may be float32."""
    return x.dtype if norm is None else norm.dtype


@triton.jit(do_not_specialize=["rows"])
def _arrange(
    x_ptr, norm_ptr, perm_ptr, value_ptr, unit_ptr, rows, eps,
    IN: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr, LARGEST: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr, HAS_NORM: tl.constexpr, HAS_PERM: tl.constexpr, GATED: tl.constexpr,
    INTEGERS: tl.constexpr, LANES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    ROUND: tl.constexpr = 12582912.0  # 1.5 * 2^23: added, a float's lowest bits are its nearest integer
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
    place = tl.arange(0, BLOCK)[None, :]
    i = block * BLOCK + place
    inside = i < IN
    if HAS_PERM:
        i = tl.load(perm_ptr + i, mask=inside, other=0)
    if HAS_NORM:
        weight = tl.load(norm_ptr + i, mask=inside, other=0.0).to(tl.float32)
    start_after_previous(OVERLAP)
    if GATED:
        gate = tl.load(x_ptr + row * 2 * IN + i, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + row * 2 * IN + IN + i, mask=inside, other=0.0).to(tl.float32)
        x = gate * tl.sigmoid(gate) * up
    else:
        x = tl.load(x_ptr + row * IN + i, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        lane = tl.arange(0, WIDTH)
        whole = tl.load(x_ptr + row * IN + lane, mask=lane < IN, other=0.0).to(tl.float32)
        x = x * (weight * tl.rsqrt(tl.sum(whole * whole, axis=0) / IN + eps))
    here = block < BLOCKS
    if LANES:
        HALF: tl.constexpr = BLOCK // 2  # four lanes hold those of a row
        at, plane = (block * 4 + place // HALF) * (8 * HALF) + row * HALF + place % HALF, 16 * HALF
    else:
        at, plane = row * (BLOCKS * BLOCK) + block * BLOCK + place, rows.to(tl.int64) * (BLOCKS * BLOCK)
    if INTEGERS:
        top = tl.maximum(tl.max(tl.abs(x), axis=1, keep_dims=True), 1e-30)
        shifted = x * (LARGEST / top) + ROUND
        integer = (shifted.to(tl.int32, bitcast=True) - 0x4B400000).to(tl.int16)
        integer = _as_stored(integer, TILE, BLOCK, BITS).to(tl.int32)
        low = ((integer + 128) & 255) - 128
        high = (integer - low) >> 8
        tl.store(value_ptr + at, high.to(tl.int8), mask=here)
        tl.store(value_ptr + plane + at, low.to(tl.int8), mask=here)
        unit = top / LARGEST
        sums = tl.sum(shifted - ROUND, axis=1, keep_dims=True) * unit
    else:
        rounded = x.to(value_ptr.dtype.element_ty)
        tl.store(value_ptr + at, _as_stored(rounded, TILE, BLOCK, BITS), mask=here)
        sums = tl.sum(rounded.to(tl.float32), axis=1, keep_dims=True)
        unit = sums * 0.0 + 1.0
    tl.store(unit_ptr + block * rows + row, unit, mask=here)
    tl.store(unit_ptr + (BLOCKS + block) * rows + row, sums, mask=here)


@triton.jit
def _as_stored(x, TILE: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr):
    """[TILE, BLOCK] in the order of `stored_order`."""
    if BITS == 8:
        return x.reshape([TILE, 4, BLOCK // 4]).permute(0, 2, 1).reshape([TILE, BLOCK])
    else:
        return x.reshape([TILE, 4, 2, BLOCK // 8]).permute(0, 2, 3, 1).reshape([TILE, BLOCK])
