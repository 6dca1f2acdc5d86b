"""Every figure of the guide, judged: agrees, differs, or impossible with the bound it breaks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from qwenfit.guide.tables import guide_claims, readme_claims
from qwenfit.guide.types import (
    AGREES,
    DIFFERS,
    IMPOSSIBLE,
    MEMORY,
    NO_WORD,
    OOM,
    S_PER_ITER,
    TOKENS_PER_S,
    Cell,
    Claim,
)

# How far plan and guide may be apart and still agree: the worst error that the plan's own accuracy targets allow.
TOLERANCE = {MEMORY: 0.10, TOKENS_PER_S: 0.20, S_PER_ITER: 0.30}
CONTRADICTION = 0.02  # two tables of the guide that state one thing this far apart contradict each other


def guide_cells() -> list[Cell]:
    """Every figure of the guide's tables in their order."""
    return _judged(guide_claims())


def readme_cells() -> list[Cell]:
    """The official README's finetuning rows that the guide does not have; `guide` is the README's figure here."""
    return _judged(readme_claims())


def guide_json(cells: list[Cell]) -> dict[str, Any]:
    """The cells and how often each word was given, as plain data."""
    counts = {word: sum(cell.word == word for cell in cells) for word in (AGREES, DIFFERS, IMPOSSIBLE)}
    return {"schema": 1, "tolerance": TOLERANCE, "counts": counts, "cells": [asdict(cell) for cell in cells]}


def _judged(claims: Iterable[Claim]) -> list[Cell]:
    claims = list(claims)
    others = defaultdict(list)
    for claim in claims:
        if claim.same:
            others[claim.same].append(claim)
    return [_judge(claim, others[claim.same] if claim.same else []) for claim in claims]


def _judge(claim: Claim, same: list[Claim]) -> Cell:
    error = _error(claim.predicted, claim.stated)
    word, reasons = _word(claim, error)
    if word in (DIFFERS, IMPOSSIBLE):
        reasons += _against_readme(claim)
        reasons += [claim.remark] if claim.remark else []
    reasons += _contradictions(claim, same)
    return Cell(
        table=claim.table,
        model=claim.model,
        where=claim.where,
        quantity=claim.quantity,
        unit=claim.unit,
        guide=claim.stated,
        official=claim.official,
        prediction=claim.predicted,
        error=error,
        word=word,
        reason="; ".join(reasons),
        confirmed=claim.confirmed,
        fits=claim.fits,
    )


def _error(predicted: float | str | None, stated: float | str | None) -> float | None:
    if isinstance(predicted, float) and isinstance(stated, float):
        return predicted / stated - 1
    return None


def _word(claim: Claim, error: float | None) -> tuple[str, list[str]]:
    """The word, and the reasons for it."""
    broken = [b.law for b in claim.bounds if claim.tested is not None and b.broken_by(claim.tested)]
    if broken:
        return IMPOSSIBLE, broken
    if claim.predicted is None:
        return NO_WORD, []
    if claim.stated == OOM:
        return (DIFFERS, ["the plan fits"]) if claim.fits else (AGREES, [])
    if claim.fits is False:
        return DIFFERS, ["the plan does not fit"]
    if error is None:
        same = claim.fits or claim.predicted == claim.stated
        return (AGREES, []) if same else (DIFFERS, ["not what the model's config.json says"])
    tolerance = TOLERANCE[claim.quantity]
    return (AGREES, []) if abs(error) <= tolerance else (DIFFERS, [f"more than {tolerance:.0%} apart"])


def _against_readme(claim: Claim) -> list[str]:
    """Whether the plan is with the official README where it is not with the guide."""
    error = _error(claim.predicted, claim.official)
    if error is None or claim.official is None:
        return []
    near = "agrees with" if abs(error) <= TOLERANCE[claim.quantity] else "differs too from"
    return [f"the plan {near} the official README's {claim.official:.4g} ({error:+.0%})"]


def _contradictions(claim: Claim, same: list[Claim]) -> list[str]:
    """Other tables of the guide that state the same thing otherwise."""
    if not isinstance(claim.stated, float):
        return []
    apart = defaultdict(list)
    for other in same:
        if isinstance(other.stated, float) and abs(other.stated / claim.stated - 1) > CONTRADICTION:
            apart[other.stated].append(other.table)
    return [f"the guide says {value:g} in {' and '.join(tables)}" for value, tables in apart.items()]
