"""A claim (one figure of a table, with the plan's beside it) and the cell it becomes when it is judged."""

from __future__ import annotations

import math
from dataclasses import dataclass

AGREES, DIFFERS, IMPOSSIBLE = "agrees", "differs", "impossible"
NO_WORD = ""  # a fact that no plan predicts, such as a release date
WORDS = (AGREES, DIFFERS, IMPOSSIBLE, NO_WORD)

MEMORY, TOKENS_PER_S, S_PER_ITER = "memory", "tokens/s", "s/iter"
OOM = "OOM"


@dataclass(frozen=True)
class Bound:
    """What a figure cannot be, in the figure's unit: below `low` or above `high`. `law` says why, in one clause.

    `low` = inf says that no run can have made the figure.
    """

    law: str
    low: float = 0.0
    high: float = math.inf

    def broken_by(self, value: float) -> bool:
        return value < self.low or value > self.high


@dataclass(frozen=True)
class Line:
    """The figures of one table that differ only in `unit` (batch, tokens); `convex`: they are of allocated memory."""

    name: str
    unit: str
    convex: bool


@dataclass(frozen=True)
class Claim:
    """One figure of a table before it is judged. `tested` is the number that the bounds are held against."""

    table: str
    model: str
    where: str
    quantity: str
    unit: str
    stated: float | str
    predicted: float | str | None
    tested: float | None = None
    official: float | None = None  # the official README's figure, where it differs
    confirmed: bool = False  # the official README has this very figure
    fits: bool | None = None  # the plan's verdict, where the figure is of a run or a card
    bounds: tuple[Bound, ...] = ()
    line: Line | None = None
    position: int = 0  # on its line
    same: str = ""  # claims with equal text here state the same thing
    remark: str = ""


@dataclass(frozen=True)
class Cell:
    """One figure of the guide, judged.

    `guide`, `official` (the README's figure, where it differs) and `prediction` are in `unit`; `error` is
    prediction / guide - 1; `word` is one of WORDS; `reason` says what was broken or why it differs.
    """

    table: str
    model: str
    where: str
    quantity: str
    unit: str
    guide: float | str
    official: float | None
    prediction: float | str | None
    error: float | None
    word: str
    reason: str
    confirmed: bool
    fits: bool | None
