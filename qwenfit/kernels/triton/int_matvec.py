"""Products of a few activation rows with an int4 or int8 weight, at the speed of reading the weight.

`int_matvec_reference` is the definition. In the kernel a program owns some rows of the weight and walks along all of
the input, so nothing is split and sums have one order. A code is not converted: its bits become the top of a float's
mantissa, 1 + q / 2^n, by one logical operation, and the 1 is subtracted from the sum of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.launch import options, start_after_previous
from qwenfit.kernels.triton.layout import block_for, pack_codes, unpack_codes
from qwenfit.kernels.triton.tuning import tuned
from qwenfit.quantize.types import QuantizedWeight

MAX_ROWS = 16
ONE = 0x3F800000  # the bits of 1.0; an argument of the kernel, so that masking and setting them is one instruction


@dataclass
class BlockedWeight:
    """An int4 or int8 weight in the layout of layout.py."""

    bits: int
    group_size: int  # columns that share a scale
    block: int  # columns of a block of the layout
    out_features: int
    in_features: int
    codes: torch.Tensor  # int32 [out, words]
    scales: torch.Tensor  # [out, groups]
    zeros: torch.Tensor | None  # uint8 or float32 [out, groups]; None: the middle code throughout
    perm: torch.Tensor | None = None  # int64 [in]: column i of the weight meets x[perm[i]]

    @property
    def nbytes(self) -> int:
        tensors = (self.codes, self.scales, self.zeros, self.perm)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def pack_blocked(
    quantized: QuantizedWeight, dtype: torch.dtype, device: torch.device | str = "cuda"
) -> BlockedWeight | None:
    """Lay a weight out for activations of `dtype`; None if its groups are no multiple of 32 columns.

    Scales become float16 beside 16-bit activations, where that rounds them by at most 2^-11; else float32.
    """
    block = block_for(quantized.group_size, quantized.in_features)
    if not block:
        return None
    scales = quantized.scales.to(device).float()
    narrow = scales.half().float()
    if dtype != torch.float32 and bool(((narrow - scales).abs() <= scales.abs() * 2**-11).all()):
        scales = scales.half()
    zeros: torch.Tensor | None = quantized.zeros.to(device).float()
    assert zeros is not None
    if bool((zeros == 2 ** (quantized.bits - 1)).all()):
        zeros = None
    elif bool((zeros == zeros.round().clamp(0, 255)).all()):
        zeros = zeros.to(torch.uint8)
    group = quantized.group_size
    if group >= quantized.in_features:
        group = -(-quantized.in_features // block) * block
    return BlockedWeight(
        quantized.bits,
        group,
        block,
        quantized.out_features,
        quantized.in_features,
        pack_codes(quantized.q.to(device), quantized.bits, block),
        scales.contiguous(),
        zeros,
        None if quantized.perm is None else quantized.perm.to(device),
    )


def unpack_blocked(weight: BlockedWeight) -> QuantizedWeight:
    """Codes, float32 scales and zeros again."""
    scales = weight.scales.float()
    zeros = torch.full_like(scales, 2 ** (weight.bits - 1)) if weight.zeros is None else weight.zeros.float()
    q = unpack_codes(weight.codes, weight.bits, weight.block, weight.in_features)
    return QuantizedWeight(weight.bits, weight.group_size, q, scales, zeros, weight.perm)


def normalised(x: torch.Tensor, norm: torch.Tensor | None, eps: float) -> torch.Tensor:
    """RMSNorm of x [rows, in] in float32 with the weight `norm` [in], or x itself in float32."""
    x = x.float()
    return x if norm is None else x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.float()


def finish(
    y: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, gated: bool, dtype: torch.dtype
) -> torch.Tensor:
    """The epilogue on float32 y [rows, out]: + bias, silu(first half) * second half, + residual."""
    if bias is not None:
        y = y + bias.float()
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = torch.nn.functional.silu(gate) * up
    if residual is not None:
        y = y + residual.float()
    return y.to(dtype)


def int_matvec_reference(
    x: torch.Tensor,
    weight: BlockedWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    gated: bool = False,
) -> torch.Tensor:
    """x [rows, in] -> [rows, out], or [rows, out / 2] when gated: float32 throughout, rounded to x's dtype once.

    `norm` [in] applies RMSNorm to x first, `gated` returns silu(first half of the outputs) * second half, `residual`
    [rows, outputs] is added last.
    """
    product = normalised(x, norm, eps) @ unpack_blocked(weight).dequantize(torch.float32).T
    return finish(product, bias, residual, gated, x.dtype)


def int_matvec(
    x: torch.Tensor,
    weight: BlockedWeight,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    gated: bool = False,
    out: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """`int_matvec_reference` in one kernel, for at most MAX_ROWS contiguous rows. `out` may be `residual`."""
    rows, outputs = x.shape[0], weight.out_features // (2 if gated else 1)
    if out is None:
        out = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    config = config or tuned("int_matvec", (weight.bits, weight.in_features, weight.out_features, rows))
    lanes = 1 << (rows - 1).bit_length()
    tile = config["rows"]
    _int_matvec[(triton.cdiv(weight.out_features, tile),)](
        x, weight.codes, weight.scales, weight.zeros, bias, residual, norm, weight.perm, out,
        rows, eps, outputs, ONE,
        IN=weight.in_features, OUT=weight.out_features, BITS=weight.bits, BLOCK=weight.block,
        GROUP_WORDS=weight.group_size * weight.bits // 32, GROUPS=weight.scales.shape[1],
        WORDS=weight.codes.shape[1], HAS_ZEROS=weight.zeros is not None, HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None, HAS_NORM=norm is not None, HAS_PERM=weight.perm is not None,
        GATED=gated, M=lanes, TILE_OUT=tile, TILE_WORDS=min(config["words"], _power_of_two(weight.codes.shape[1])),
        num_warps=config["warps"], **options(x),
    )  # fmt: skip
    return out


def _power_of_two(n: int) -> int:
    return 1 << max(2, (n - 1).bit_length())


@triton.jit
def code_as_float(words, one, j: tl.constexpr, BITS: tl.constexpr):
    """Code j of each word as the float 1 + q / 2^n; `code_unit` is n."""
    if BITS == 4:
        if j < 3:
            moved = words << 11
        elif j < 6:
            moved = words >> 1
        else:
            moved = words >> 9
    else:
        if j < 2:
            moved = words << 7
        else:
            moved = words >> 9
    mask: tl.constexpr = (2**BITS - 1) << (23 - code_unit(j, BITS))
    return ((moved & mask) | one).to(tl.float32, bitcast=True)


@triton.constexpr_function
def code_unit(j, bits):
    """n of `code_as_float`: how far below the mantissa's top code j ends up."""
    if bits == 4:
        return (12, 8, 4, 12, 8, 4, 8, 4)[j]
    return (16, 8, 16, 8)[j]


@triton.jit
def sum_quads(x):
    """[4 n, ...] -> [n, ...]: the sum over the four words that a thread holds."""
    return tl.sum(x.reshape([x.shape[0] // 4, 4, x.shape[1], x.shape[2]]), axis=1)


@triton.jit
def _int_matvec(
    x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, norm_ptr, perm_ptr, y_ptr,
    rows, eps, outputs, one,
    IN: tl.constexpr, OUT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
    GROUP_WORDS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
    HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr,
    HAS_PERM: tl.constexpr, GATED: tl.constexpr,
    M: tl.constexpr, TILE_OUT: tl.constexpr, TILE_WORDS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # Tensors are [words or quads of words, rows of the weight, rows of x]: with the input first, Triton gives every
    # load the same layout, a thread four consecutive words, and nothing goes through shared memory within the loop.
    PER_WORD: tl.constexpr = 32 // BITS
    BLOCK_WORDS: tl.constexpr = BLOCK // PER_WORD
    QUADS: tl.constexpr = TILE_WORDS // 4
    tile = tl.program_id(0) * TILE_OUT + tl.arange(0, TILE_OUT)
    if GATED:  # a gate's row beside its partner
        of_tile = (tile % 2) * (OUT // 2) + tile // 2
    else:
        of_tile = tile
    row = of_tile[None, :, None]
    here = (tile < OUT)[None, :, None]
    word = tl.arange(0, TILE_WORDS)[:, None, None]
    quad = tl.arange(0, QUADS)[:, None, None]
    batch = tl.arange(0, M)[None, None, :]
    w_at = w_ptr + row * WORDS + word
    words = tl.load(w_at, mask=here & (word < WORDS), other=0, eviction_policy="evict_first")
    start_after_previous(OVERLAP)
    total = tl.zeros([QUADS, TILE_OUT, M], tl.float32)
    squares = tl.zeros([QUADS, 1, M], tl.float32)
    for start in range(0, WORDS, TILE_WORDS):
        ahead = start + TILE_WORDS + word
        following = tl.load(w_at + (start + TILE_WORDS), mask=here & (ahead < WORDS), other=0,
                            eviction_policy="evict_first")  # fmt: skip
        at = start + word
        column = tl.max_contiguous(at // BLOCK_WORDS * BLOCK + at % BLOCK_WORDS, [4, 1, 1])
        acc = tl.zeros([TILE_WORDS, TILE_OUT, M], tl.float32)
        ones = tl.zeros([TILE_WORDS, 1, M], tl.float32)  # what the 1 in each float added
        sums = tl.zeros([TILE_WORDS, 1, M], tl.float32)
        square = tl.zeros([TILE_WORDS, 1, M], tl.float32)
        for j in tl.static_range(PER_WORD):
            i = column + j * BLOCK_WORDS
            inside = (i < IN) & (at < WORDS)
            if HAS_PERM:
                i = tl.load(perm_ptr + i, mask=inside, other=0)
            x = tl.load(x_ptr + batch * IN + i, mask=inside & (batch < rows), other=0.0).to(tl.float32)
            if HAS_NORM:
                square += x * x
                x *= tl.load(norm_ptr + i, mask=inside, other=0.0).to(tl.float32)
            sums += x
            x *= 2 ** (code_unit(j, BITS) - BITS)
            ones += x
            acc += x * code_as_float(words, one, j, BITS)
        part = sum_quads(acc) - sum_quads(ones)
        if HAS_NORM:
            squares += sum_quads(square)
        first = start + quad * 4
        group = row * GROUPS + first // GROUP_WORDS
        some = here & (first < WORDS)
        scale = tl.load(scale_ptr + group, mask=some, other=0.0).to(tl.float32)
        if HAS_ZEROS:
            zero = tl.load(zero_ptr + group, mask=some, other=0).to(tl.float32)
        else:
            zero = 2.0 ** (BITS - 1)
        total += scale * (part * 2.0**BITS - sum_quads(sums) * zero)
        words = following
    y = tl.sum(total, axis=0)  # [TILE_OUT, M]
    if HAS_NORM:
        y *= tl.rsqrt(tl.sum(squares, axis=0) / IN + eps)
    batch = tl.arange(0, M)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + of_tile, mask=tile < OUT, other=0.0).to(tl.float32)[:, None]
    if GATED:
        gate, up = tl.split(tl.permute(y.reshape([TILE_OUT // 2, 2, M]), (0, 2, 1)))
        y = gate * tl.sigmoid(gate) * up
        output = tl.program_id(0) * (TILE_OUT // 2) + tl.arange(0, TILE_OUT // 2)[:, None]
    else:
        output = tile[:, None]
    store = (batch < rows) & (output < outputs)
    place = batch * outputs + output
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + place, mask=store, other=0.0).to(tl.float32)
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=store)
