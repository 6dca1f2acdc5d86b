"""The processes that train together, as the loop sees them. Here: one."""

from __future__ import annotations

from qwenfit.tune.optimizer import AdamW


class World:
    """One process. Rank r takes every `size`-th micro-batch from its r-th on; rank 0 alone writes."""

    rank = 0
    size = 1

    def total(self, value: float) -> float:
        """The sum of `value` over the processes."""
        return value

    def sum_gradients(self, optimizer: AdamW) -> None:
        """Make every process's gradients the sum over all of them."""

    def gradient_norm(self, optimizer: AdamW) -> float:
        """The norm over all gradients, each counted once however it is sharded."""
        return float(optimizer.gradient_norm())
