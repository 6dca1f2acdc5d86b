"""The layout of int4 and int8 weights that the GPU kernels read.

A row's columns are cut into blocks of `block` = 128, 64 or 32, and a block into words of 32 bits. Code j of word i of a
block is that of column j * words_per_block + i: the 16 bytes that a thread loads hold consecutive words, so for each j
the matching activations are consecutive too.

Where groups have zeros of their own, a scale and its zero are one number, so that one load brings both: a float16 each
in an int32, the scale in its low half, if scales are float16 and all zeros codes; else a float32 each in an int64.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.nn.functional import pad

from qwenfit.kernels.triton.paged import scale_of, zero_of

_PIECE = 1 << 24  # codes handled at once: 64 MiB as int32


def block_for(group_size: int, in_features: int) -> int:
    """Columns of a block: the largest of 128, 64, 32 that divides the group; 0 when none does.

    A row that is a single group may be padded, so it takes 128.
    """
    if group_size >= in_features:
        return 128
    return next((block for block in (128, 64, 32) if group_size % block == 0), 0)


def pack_codes(q: torch.Tensor, bits: int, block: int) -> torch.Tensor:
    """uint8 codes [out, in] -> int32 [out, in padded to blocks / codes of a word]. Padded columns have code 0."""
    out_features, in_features = q.shape
    per_word = 32 // bits
    blocks = -(-in_features // block)
    packed = torch.empty(out_features, blocks * block // per_word, dtype=torch.int32, device=q.device)
    step = max(1, _PIECE // in_features)
    for start in range(0, out_features, step):
        piece = pad(q[start : start + step], (0, blocks * block - in_features))
        codes = piece.view(-1, blocks, per_word, block // per_word).to(torch.int32)
        words = codes[:, :, 0].clone()
        for position in range(1, per_word):
            words |= codes[:, :, position] << bits * position
        packed[start : start + step] = words.flatten(1)
    return packed


def unpack_codes(packed: torch.Tensor, bits: int, block: int, in_features: int) -> torch.Tensor:
    """The inverse of `pack_codes`: uint8 [out, in]."""
    per_word = 32 // bits
    words = packed.unflatten(1, (-1, 1, block // per_word))  # [out, blocks, 1, words]
    shifts = torch.arange(0, 32, bits, device=packed.device, dtype=torch.int32)[:, None]
    codes: torch.Tensor = (words >> shifts) & (2**bits - 1)
    return codes.flatten(1)[:, :in_features].to(torch.uint8)


def join_zeros(scales: torch.Tensor, zeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Scales [out, groups], float16 or float32, and the zeros of codes of some bits -> int32 or int64 [out, groups]."""
    whole = bool((zeros == zeros.round().clamp(0, 2**bits - 1)).all())
    dtype, joined = (
        (scales.dtype, torch.int32) if whole and scales.dtype == torch.float16 else (torch.float32, torch.int64)
    )
    return torch.stack((scales.to(dtype), zeros.to(dtype)), -1).contiguous().view(joined)[..., 0]


def split_zeros(words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `join_zeros`: float32 scales and zeros."""
    dtype = torch.float16 if words.dtype == torch.int32 else torch.float32
    scales, zeros = words[..., None].view(dtype).float().unbind(-1)
    return scales, zeros


@triton.jit
def scale_in(stored):
    """float32 scales of what a weight has in their place."""
    if stored.dtype == tl.int64:
        return scale_of(stored)
    elif stored.dtype == tl.int32:
        return (stored & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return stored.to(tl.float32)


@triton.jit
def zero_in(stored, BITS: tl.constexpr):
    """Their float32 zeros: the middle code where a weight has scales alone."""
    if stored.dtype == tl.int64:
        return zero_of(stored)
    elif stored.dtype != tl.int32:
        return 2.0 ** (BITS - 1)
    else:
        return (stored >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
