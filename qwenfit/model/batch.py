"""Batch: one ragged step of the network. Sequences of any lengths lie end to end; there is no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qwenfit.kernels.attention import RaggedStep


@dataclass
class Batch:
    """B sequences, T tokens: each sequence brings a chunk of its prompt, or its newest token."""

    input_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T], absolute within its own sequence
    query_lens: list[int]  # [B], sums to T
    context_lens: list[int]  # [B], cached tokens of the sequence, this step's included
    block_tables: torch.Tensor  # int32 [B, max_blocks]
    slots: torch.Tensor  # int64 [T]: block * block_size + offset, where the token's key and value go
    ntk_alphas: list[float]  # [B]: ModelConfig.ntk_alpha(length of the whole prompt); 1.0: none
    logits_indices: torch.Tensor  # int64 [n]: the rows of T whose logits are wanted

    def step(self, block_size: int, dtype: torch.dtype) -> RaggedStep:
        """The part that attention needs, for a cache of `block_size` and queries of `dtype`."""
        return RaggedStep(self.query_lens, self.context_lens, self.block_tables, self.slots, block_size, dtype)


@dataclass(frozen=True)
class Chunk:
    """What one sequence brings to a step."""

    token_ids: Sequence[int]
    cached: int  # tokens of the sequence that are in the cache already
    block_table: Sequence[int]  # the sequence's blocks, in order; enough for cached + len(token_ids) tokens
    ntk_alpha: float = 1.0
    logits: str = "last"  # which rows' logits are wanted: "last", "all" or "none"


def make_batch(chunks: Sequence[Chunk], block_size: int, device: torch.device | str = "cpu") -> Batch:
    """Lay the chunks end to end, in their order."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    rows: list[int] = []
    for chunk in chunks:
        start, length = len(ids), len(chunk.token_ids)
        where = range(chunk.cached, chunk.cached + length)
        ids += chunk.token_ids
        positions += where
        slots += [chunk.block_table[p // block_size] * block_size + p % block_size for p in where]
        rows += {"last": [start + length - 1], "all": list(range(start, start + length)), "none": []}[chunk.logits]
    width = max(len(chunk.block_table) for chunk in chunks)
    tables = [[*chunk.block_table, *[0] * (width - len(chunk.block_table))] for chunk in chunks]
    return Batch(
        input_ids=torch.tensor(ids, device=device),
        positions=torch.tensor(positions, device=device),
        query_lens=[len(chunk.token_ids) for chunk in chunks],
        context_lens=[chunk.cached + len(chunk.token_ids) for chunk in chunks],
        block_tables=torch.tensor(tables, dtype=torch.int32, device=device),
        slots=torch.tensor(slots, device=device),
        ntk_alphas=[chunk.ntk_alpha for chunk in chunks],
        logits_indices=torch.tensor(rows, dtype=torch.int64, device=device),
    )
