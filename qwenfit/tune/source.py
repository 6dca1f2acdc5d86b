"""Rows of samples as micro-batches: padded, or packed with segments; shuffled anew for every epoch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qwenfit.tune.batch import IGNORE, Sample, TrainBatch


class Rows:
    """A BatchSource over rows, each one sample or several packed ones, `micro_batch` of them at a time.

    The order of epoch e follows from (seed, e); `shuffle` False keeps the rows' own. A last, smaller micro-batch is
    kept. `pad` False: a batch is as wide as its longest row needs, in multiples of 8 (16-bit matrix units like them);
    else `seq_len` wide whatever it holds.
    """

    def __init__(
        self,
        rows: Sequence[Sequence[Sample]],
        seq_len: int,
        micro_batch: int,
        pad_id: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        pad: bool = True,
    ) -> None:
        self.rows, self.seq_len, self.micro_batch, self.pad_id = rows, seq_len, micro_batch, pad_id
        self.seed, self.shuffle, self.pad = seed, shuffle, pad
        self._order: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return -(-len(self.rows) // self.micro_batch)

    def batch(self, epoch: int, index: int) -> TrainBatch:
        start = index * self.micro_batch
        rows = [self.rows[i] for i in self._order_of(epoch)[start : start + self.micro_batch]]
        longest = max(sum(len(s.input_ids) for s in row) for row in rows)
        width = self.seq_len if self.pad else min(self.seq_len, -(-longest // 8) * 8)
        return collate(rows, width, self.pad_id)

    def _order_of(self, epoch: int) -> list[int]:
        if self._order[0] != epoch:
            order = list(range(len(self.rows)))
            if self.shuffle:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(len(self.rows), generator=generator).tolist()
            self._order = (epoch, order)
        return self._order[1]


def collate(rows: Sequence[Sequence[Sample]], width: int, pad_id: int) -> TrainBatch:
    """Rows of samples laid end to end, `width` tokens each: what is longer is cut, what is shorter padded."""
    shape = (len(rows), width)
    ids = torch.full(shape, pad_id)
    labels = torch.full(shape, IGNORE)
    positions = torch.arange(width).repeat(len(rows), 1)
    packed = any(len(row) > 1 for row in rows)
    segments = torch.full(shape, -1, dtype=torch.int32) if packed else None
    for r, row in enumerate(rows):
        start = 0
        for number, sample in enumerate(row):
            stop = min(width, start + len(sample.input_ids))
            ids[r, start:stop] = torch.tensor(sample.input_ids[: stop - start], dtype=torch.int64)
            labels[r, start:stop] = torch.tensor(sample.labels[: stop - start], dtype=torch.int64)
            positions[r, start:] = torch.arange(width - start)
            if segments is not None:
                segments[r, start:stop] = number
            start = stop
    return TrainBatch(ids, labels, positions, segments, [sample.source for row in rows for sample in row])
