from __future__ import annotations

import pytest

from qwenfit.engine.padding import SIZES, padded, padded_sizes


def test_padding_is_small_and_of_few_sizes():
    for rows in range(1, 5000):
        size = padded(rows)
        assert size >= rows and padded(size) == size
        assert size in SIZES if rows <= SIZES[-1] else size <= rows + rows / 8
    assert len({padded(rows) for rows in range(1, 2049)}) < 40


@pytest.mark.parametrize("most", [1, 8, 9, 256, 257, 2048, 8192])
def test_every_size_is_known_at_the_start(most):
    sizes = list(padded_sizes(most))
    assert sizes == sorted({padded(rows) for rows in range(1, most + 1)})
