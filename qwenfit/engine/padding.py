"""How many rows the steps of a GPU have: few numbers, so that each is recorded, or its kernels loaded, at the start."""

from __future__ import annotations

from collections.abc import Iterator

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)  # of a decoding step
_LEAST, _MOST_APART = 8, 128


def padded(rows: int) -> int:
    """What a step with prompts of so many rows is padded to: one of SIZES; above, by an eighth at most."""
    if rows <= SIZES[-1]:
        return next(size for size in SIZES if size >= max(rows, _LEAST))
    apart = min(1 << (rows - 1).bit_length() - 4, _MOST_APART)
    return -(-rows // apart) * apart


def padded_sizes(most: int) -> Iterator[int]:
    """All that `padded` gives for up to `most` rows, ascending."""
    size = padded(1)
    while size < most:
        yield size
        size = padded(size + 1)
    yield size
