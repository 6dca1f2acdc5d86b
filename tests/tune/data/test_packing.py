"""Packing loses no sample, splits none, and leaves little room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenfit.tune.batch import Sample
from qwenfit.tune.data.packing import pack


def make(lengths):
    return [Sample([i] * n, [i] * n, f"f:{i}") for i, n in enumerate(lengths)]


@given(st.lists(st.integers(1, 64), max_size=80))
def test_every_sample_is_in_one_row_whole_and_no_row_is_too_long(lengths):
    samples = make(lengths)
    rows = pack(samples, 64)
    assert sorted(id(s) for row in rows for s in row) == sorted(map(id, samples))
    assert all(0 < sum(len(s.input_ids) for s in row) <= 64 for row in rows)
    # At most one row is half empty: any two such would have been one.
    assert sum(sum(len(s.input_ids) for s in row) <= 32 for row in rows) <= 1
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) + sum(n > 32 for n in lengths) + 1
    assert pack(samples, 64) == rows


def test_each_sample_goes_where_it_fits_best():
    rows = pack(make([5, 3, 7, 2, 3]), 10)
    assert [[len(s.input_ids) for s in row] for row in rows] == [[7, 3], [5, 3, 2]]


def test_a_sample_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="f:1 has 11 tokens"):
        pack(make([2, 11]), 10)
