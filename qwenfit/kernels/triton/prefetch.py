"""Weights on their way to the second-level cache while a kernel runs that leaves the memory idle.

The attention of one short sequence is over in the time that its steps wait for each other, not in that of its bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_PIECE = 2048  # bytes that a thread asks for
_THREADS = 128


def has_prefetch(device: torch.device) -> bool:
    """Whether the device takes a request for many bytes at once (compute capability 9.0)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def prefetch(weights: tuple[torch.Tensor, torch.Tensor], context_lens: torch.Tensor, per_token: int, most: int) -> None:
    """Ask for the first bytes of two tensors, those of the first tensor first; nothing is returned or changed.

    Of `most` bytes, `per_token` for each token of context_lens[0] are left to the kernel beside it, whose own would
    otherwise drive these out again.
    """
    first, second = weights
    pieces = [tensor.nbytes // _PIECE for tensor in (first, second)]
    pieces[1] = max(0, min(pieces[1], most // _PIECE - pieces[0]))
    _prefetch[(triton.cdiv(sum(pieces), _THREADS),)](
        first.view(torch.int8), second.view(torch.int8), context_lens, *pieces, per_token, most,
        PIECE=_PIECE, THREADS=_THREADS, num_warps=_THREADS // 32,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_pieces", "second_pieces", "per_token", "most"])
def _prefetch(
    first_ptr, second_ptr, context_ptr, first_pieces, second_pieces, per_token, most,
    PIECE: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0).to(tl.int64) * THREADS + tl.arange(0, THREADS)
    last = (most - tl.load(context_ptr).to(tl.int64) * per_token) // PIECE
    if tl.program_id(0) * THREADS < last:
        from_second = tl.minimum(tl.maximum(piece - first_pieces, 0), tl.maximum(second_pieces - 1, 0))
        first = first_ptr.to(tl.int64) + tl.minimum(piece, first_pieces - 1) * PIECE
        second = second_ptr.to(tl.int64) + from_second * PIECE
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], 2048; mov.b32 $0, 0;", "=r,l",
            [tl.where(piece < first_pieces, first, second)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
