"""The layout of int4 and int8 weights that the GPU kernels read.

A row's columns are cut into blocks of `block` = 128, 64 or 32, and a block into words of 32 bits. Code j of word i of a
block is that of column j * words_per_block + i: the 16 bytes that a thread loads hold consecutive words, so for each j
the matching activations are consecutive too.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

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
