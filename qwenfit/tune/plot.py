"""A line chart as a PNG, from the standard library alone (W3C PNG specification, third edition)."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 900, 420, 80, 40, 16
WHITE, GREY, BLACK = (255, 255, 255), (220, 220, 220), (60, 60, 60)
COLOURS = ((31, 119, 180), (214, 39, 40))  # the first line, the second

# 3 x 5 glyphs, a row of bits each, most significant on the left.
_GLYPHS = {
    "0": (7, 5, 5, 5, 7), "1": (2, 6, 2, 2, 7), "2": (7, 1, 7, 4, 7), "3": (7, 1, 7, 1, 7), "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7), "6": (7, 4, 7, 5, 7), "7": (7, 1, 1, 1, 1), "8": (7, 5, 7, 5, 7), "9": (7, 5, 7, 1, 7),
    ".": (0, 0, 0, 0, 2), "-": (0, 0, 7, 0, 0), "e": (0, 7, 5, 6, 7), "+": (0, 2, 7, 2, 0),
}  # fmt: skip

Point = tuple[float, float]


def line_chart(path: Path, lines: list[list[Point]]) -> None:
    """Up to two lines of (x, y) with numbered axes. Points that are no finite numbers are left out."""
    lines = [[(x, y) for x, y in line if math.isfinite(x) and math.isfinite(y)] for line in lines]
    points = [point for line in lines for point in line]
    if not points:
        return
    canvas = _Canvas()
    xs, ys = _ticks(*_span(x for x, _ in points)), _ticks(*_span(y for _, y in points))
    for x in xs:
        column = canvas.column(x, xs)
        canvas.line(column, MARGIN, column, HEIGHT - BOTTOM, GREY)
        canvas.text(f"{x:g}", column - 4 * len(f"{x:g}"), HEIGHT - BOTTOM + 10)
    for y in ys:
        row = canvas.row(y, ys)
        canvas.line(LEFT, row, WIDTH - MARGIN, row, GREY)
        canvas.text(f"{y:.4g}", LEFT - 8 - 8 * len(f"{y:.4g}"), row - 5)
    for line, colour in zip(lines, COLOURS, strict=False):
        places = [(canvas.column(x, xs), canvas.row(y, ys)) for x, y in line]
        for (x0, y0), (x1, y1) in zip(places, places[1:] or places, strict=False):
            canvas.line(x0, y0, x1, y1, colour)
    path.write_bytes(canvas.png())


def _span(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    low, high = min(found), max(found)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers about an eighth of the span apart, from below `low` to above `high`."""
    raw = (high - low) / 8
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw)
    first = math.floor(low / step)
    return [i * step for i in range(first, math.ceil(high / step) + 1)]


class _Canvas:
    def __init__(self) -> None:
        self.rows = [bytearray(bytes(WHITE) * WIDTH) for _ in range(HEIGHT)]

    def column(self, x: float, ticks: list[float]) -> int:
        return LEFT + round((x - ticks[0]) / (ticks[-1] - ticks[0]) * (WIDTH - MARGIN - LEFT))

    def row(self, y: float, ticks: list[float]) -> int:
        return HEIGHT - BOTTOM - round((y - ticks[0]) / (ticks[-1] - ticks[0]) * (HEIGHT - BOTTOM - MARGIN))

    def dot(self, x: int, y: int, colour: tuple[int, int, int]) -> None:
        if 0 <= x < WIDTH and 0 <= y < HEIGHT:
            self.rows[y][3 * x : 3 * x + 3] = bytes(colour)

    def line(self, x0: int, y0: int, x1: int, y1: int, colour: tuple[int, int, int]) -> None:
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        for i in range(steps + 1):
            self.dot(round(x0 + (x1 - x0) * i / steps), round(y0 + (y1 - y0) * i / steps), colour)

    def text(self, text: str, x: int, y: int) -> None:
        for character in text:
            for row, bits in enumerate(_GLYPHS[character]):
                for column in range(3):
                    if bits >> (2 - column) & 1:
                        for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
                            self.dot(x + 2 * column + dx, y + 2 * row + dy, BLACK)
            x += 8

    def png(self) -> bytes:
        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, 2, 0, 0, 0)  # 8-bit RGB, no interlacing
        pixels = zlib.compress(b"".join(b"\0" + row for row in self.rows))
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
