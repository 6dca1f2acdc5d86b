"""What the data side hands to the trainer: a sample, a micro-batch, and where batches come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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


def segment_lengths(batch: TrainBatch) -> list[int] | None:
    """Lengths of the runs of equal segment ids over the rows laid end to end, B * S tokens; None without segments."""
    if batch.segment_ids is None:
        return None
    lengths: list[int] = []
    for row in batch.segment_ids:
        lengths += torch.unique_consecutive(row, return_counts=True)[1].tolist()
    return lengths
