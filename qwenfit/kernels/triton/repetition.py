"""The repetition penalty in one kernel: the defaults of many a Qwen ask for it at every token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.launch import options, start_after_previous

_TILE = 1024


def penalise_repetition_reference(logits: torch.Tensor, tokens: torch.Tensor, given: torch.Tensor) -> None:
    """Divide by its penalty each logit above 0 of a token that was there, and multiply those below; each token once.

    logits float32 [B, rows of the head], changed in place; tokens int32 [rows, columns]. given int64 [4, n]: for each
    sequence its row of logits, its row of tokens, how many of them count, and the bits of its penalty in float64.
    """
    for row, held, count, bits in given.T:
        penalty = bits.view(torch.float64).float()
        seen = tokens[held, :count].unique().long()
        values = logits[row, seen]
        logits[row, seen] = torch.where(values > 0, values / penalty, values * penalty)


def penalise_repetition(logits: torch.Tensor, tokens: torch.Tensor, given: torch.Tensor, longest: int) -> None:
    """`penalise_repetition_reference` for sequences of at most `longest` tokens; logits have contiguous rows."""
    before = torch.empty(given.shape[1], longest, dtype=torch.float32, device=logits.device)
    _penalise_repetition[(given.shape[1],)](
        logits, tokens, given, before, logits.stride(0), tokens.stride(0), given.shape[1], longest,
        TILE=_TILE, num_warps=8, **options(logits),
    )  # fmt: skip


@triton.jit(do_not_specialize=["stride", "width", "count", "longest"])
def _penalise_repetition(
    logits_ptr, tokens_ptr, given_ptr, before_ptr, stride, width, count, longest,
    TILE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    sequence = tl.program_id(0)
    logits_ptr += tl.load(given_ptr + sequence) * stride
    tokens_ptr += tl.load(given_ptr + count + sequence) * width
    length = tl.load(given_ptr + 2 * count + sequence).to(tl.int32)
    penalty = tl.load(given_ptr + 3 * count + sequence).to(tl.float64, bitcast=True).to(tl.float32)
    before_ptr += sequence.to(tl.int64) * longest
    lane = tl.arange(0, TILE)
    for start in range(0, length, TILE):  # all are read before one is changed: a token may be there twice
        here = start + lane < length
        token = tl.load(tokens_ptr + start + lane, mask=here, other=0)
        tl.store(before_ptr + start + lane, tl.load(logits_ptr + token, mask=here, other=0.0), mask=here)
    tl.debug_barrier()
    for start in range(0, length, TILE):
        here = start + lane < length
        token = tl.load(tokens_ptr + start + lane, mask=here, other=0)
        x = tl.load(before_ptr + start + lane, mask=here, other=0.0)  # rounded as torch does it, beside other penalties
        tl.store(logits_ptr + token, tl.where(x > 0, tl.div_rn(x, penalty), x * penalty), mask=here)
