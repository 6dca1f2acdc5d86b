"""Packing: samples put together into rows so that little is padding."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from qwenfit.tune.batch import Sample


def pack(samples: Sequence[Sample], seq_len: int) -> list[list[Sample]]:
    """Rows of whole samples, at most `seq_len` tokens each. Raises ValueError for a longer sample.

    Best fit decreasing: from the longest on, each goes into the row that it fills best. It needs at most 11/9 of the
    fewest rows possible, plus one (Johnson 1973). Equal samples give equal rows.
    """
    rows: list[list[Sample]] = []
    with_room: dict[int, list[int]] = {}  # tokens left -> rows
    rooms: list[int] = []  # the keys of with_room, ascending
    for sample in sorted(samples, key=lambda sample: -len(sample.input_ids)):
        length = len(sample.input_ids)
        if length > seq_len:
            raise ValueError(f"{sample.source} has {length} tokens, a row {seq_len}")
        best = bisect_left(rooms, length)
        if best == len(rooms):
            row, room = len(rows), seq_len
            rows.append([])
        else:
            room = rooms[best]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[best]
        rows[row].append(sample)
        left = room - length
        if left not in with_room:
            with_room[left] = []
            insort(rooms, left)
        with_room[left].append(row)
    return rows
