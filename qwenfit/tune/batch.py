"""What the data side hands to the trainer: a sample, a micro-batch, and where batches come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

IGNORE = -100  # a label that is not trained


@dataclass
class Sample:
    """One tokenised sample; `labels[i]` is `input_ids[i]` where the token is trained, IGNORE elsewhere."""

    input_ids: list[int]
    labels: list[int]
    source: str  # "file:line", so that a bad sample can be named


@dataclass
class TrainBatch:
    """One micro-batch of B rows of S tokens, not yet shifted: position t is trained to predict `labels[:, t + 1]`.

    Padding is on the right.
    """

    input_ids: Tensor  # int64 [B, S]
    labels: Tensor  # int64 [B, S], IGNORE where not trained
    position_ids: Tensor  # int64 [B, S], from 0 in each sample
    segment_ids: Tensor | None  # int32 [B, S]: attention only within equal ids, -1 is padding; None: one sample a row
    sources: list[str]  # "file:line" of every sample in the batch


class BatchSource(Protocol):
    """Micro-batches by position, so that a run can resume anywhere: an epoch's order follows from its number."""

    def __len__(self) -> int:
        """Micro-batches in one epoch."""

    def batch(self, epoch: int, index: int) -> TrainBatch:
        """Micro-batch `index` of epoch `epoch`, on the CPU."""


def targets_of(batch: TrainBatch) -> Tensor:
    """int64 [B, S]: the token that each position is trained to predict, IGNORE where none is.

    The last position of a row, and of a packed segment, predicts nothing.
    """
    targets = torch.full_like(batch.labels, IGNORE)
    targets[:, :-1] = batch.labels[:, 1:]
    if batch.segment_ids is not None:
        targets[:, :-1][batch.segment_ids[:, 1:] != batch.segment_ids[:, :-1]] = IGNORE
    return targets


def merged(batches: list[TrainBatch], count: int) -> list[TrainBatch]:
    """Each `count` micro-batches as one, the narrower ones padded: the same gradients in fewer, larger passes."""
    groups = [batches[i : i + count] for i in range(0, len(batches), count)]
    return [_joined(group) if len(group) > 1 else group[0] for group in groups]


def _joined(batches: list[TrainBatch]) -> TrainBatch:
    width = max(b.input_ids.shape[1] for b in batches)

    def rows(tensors: list[Tensor], fill: int) -> Tensor:
        return torch.cat([pad(t, (0, width - t.shape[1]), value=fill) for t in tensors])

    segments = None
    if any(b.segment_ids is not None for b in batches):
        whole = [
            torch.zeros_like(b.labels, dtype=torch.int32) if b.segment_ids is None else b.segment_ids for b in batches
        ]
        segments = rows(whole, -1)
    return TrainBatch(
        rows([b.input_ids for b in batches], 0),
        rows([b.labels for b in batches], IGNORE),
        rows([b.position_ids for b in batches], 0),
        segments,
        [name for b in batches for name in b.sources],
    )


def segment_lengths(batch: TrainBatch) -> list[int] | None:
    """Lengths of the runs of equal segment ids over the rows laid end to end, B * S tokens; None without segments."""
    if batch.segment_ids is None:
        return None
    lengths: list[int] = []
    for row in batch.segment_ids:
        lengths += torch.unique_consecutive(row, return_counts=True)[1].tolist()
    return lengths
