"""How many processes torchrun started. Imports nothing heavy."""

from __future__ import annotations

import os


def processes() -> tuple[int, int]:
    """(processes on this host, processes in all) as torchrun's environment says; (1, 1) without it."""
    total = int(os.environ.get("WORLD_SIZE", "1"))
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(total))), total


def launched() -> bool:
    """Whether torchrun, or what sets its variables, started this process; there may be one alone."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def rank() -> int:
    """Of this process among all that torchrun started; 0 without it."""
    return int(os.environ.get("RANK", "0")) if launched() else 0
