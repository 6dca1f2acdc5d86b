"""What the sequences of a step bring to it, as the host knows it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Brought:
    """What the sequences of a step bring, end to end; those that bring one token come first."""

    ids: list[int]  # -1 - row stands for the newest token of the sequence in that row, which the device alone knows
    positions: list[int]
    slots: list[int]
    last: list[int]  # rows whose logits are wanted
    query_lens: list[int]
    context_lens: list[int]

    @property
    def singles(self) -> int:
        """How many sequences at the beginning bring one token each."""
        return next((i for i, count in enumerate(self.query_lens) if count > 1), len(self.query_lens))
