"""The guide's tables in the terminal, cell by cell."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qwenfit.errors import UsageError, nearest
from qwenfit.guide.cells import TOLERANCE, guide_cells, readme_cells
from qwenfit.guide.tables import TITLES
from qwenfit.guide.types import AGREES, DIFFERS, IMPOSSIBLE, Cell

NARROWEST = 100  # columns; a pipe has no width of its own
STYLES = {AGREES: "green", DIFFERS: "yellow", IMPOSSIBLE: "bold red"}


def cells_of(table: str | None) -> list[Cell]:
    """Every cell of the guide, or of one table ("readme" is the official README's). UsageError for an unknown name."""
    if table is not None and table not in TITLES:
        near = nearest(table, list(TITLES)) or list(TITLES)
        raise UsageError(f"The guide has no table named {table!r}.", f"Did you mean {', '.join(near)}?")
    return readme_cells() if table == "readme" else [c for c in guide_cells() if table in (None, c.table)]


def print_guide(console: Console, table: str | None = None) -> None:
    """Prints every table of the guide, or one, as `cells_of` knows it.

    Without a terminal the output has no colours and no lines, and is at least 100 columns wide.
    """
    cells = cells_of(table)
    groups: dict[tuple[str, str, str], list[Cell]] = {}  # by table, quantity and unit, in the guide's order
    for cell in cells:
        groups.setdefault((cell.table, cell.quantity, cell.unit), []).append(cell)
    width = console.width
    if not console.is_terminal:
        console.width = max(width, NARROWEST)
    try:
        for name in dict.fromkeys(cell.table for cell in cells):
            _print_table(console, name, [group for key, group in groups.items() if key[0] == name])
        console.print(Text(_summary(cells), style="bold"))
        console.print(Text(_legend(), style="dim"))
    finally:
        console.width = width


def _print_table(console: Console, name: str, groups: list[list[Cell]]) -> None:
    """One table of the guide: a block for each of its quantities, then the notes that the blocks refer to."""
    notes: dict[str, int] = {}
    console.print(Text(f"{TITLES[name]} ({name})", style="bold"))
    for group in groups:
        console.print()
        console.print(_block(group, notes, lines=console.is_terminal))
    console.print()
    for reason, number in notes.items():
        console.print(Padding(Text(f"{number}  {reason}"), (0, 0, 0, 2)))
    if notes:
        console.print()


def _block(cells: list[Cell], notes: dict[str, int], lines: bool) -> Table:
    first = cells[0]
    heading = first.quantity if first.unit in ("", first.quantity) else f"{first.quantity}, {first.unit}"
    with_readme = any(cell.official is not None for cell in cells)
    with_error = any(cell.error is not None for cell in cells)
    shown = Table(box=SIMPLE_HEAD if lines else None, pad_edge=False, show_edge=False)
    shown.add_column("model", no_wrap=True)
    shown.add_column(heading)
    shown.add_column("README" if first.table == "readme" else "guide", justify="right", no_wrap=True)
    if with_readme:
        shown.add_column("README", justify="right", no_wrap=True)
    shown.add_column("plan", justify="right" if with_error else "left")
    if with_error:
        shown.add_column("error", justify="right", no_wrap=True)
    shown.add_column("word", no_wrap=True)
    shown.add_column("note", justify="right", no_wrap=True)
    for cell in cells:
        note = str(notes.setdefault(cell.reason, len(notes) + 1)) if cell.reason else ""
        row = [cell.model, cell.where, _number(cell.guide)]
        row += [_number(cell.official)] if with_readme else []
        row += [_number(cell.prediction)]
        row += [error_text(cell.error)] if with_error else []
        shown.add_row(*row, Text(cell.word or "-", style=STYLES.get(cell.word, "dim")), note)
    return shown


def _number(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else number_text(value)


def number_text(value: float) -> str:
    """Two decimals below 100, then one: 16.97, 0.96, 144.7."""
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.1f}"


def error_text(error: float | None) -> str:
    """Signed per cent with one decimal; nothing for no error."""
    return "" if error is None else f"{100 * error:+.1f} %"


def _summary(cells: list[Cell]) -> str:
    counts = [(word, sum(cell.word == word for cell in cells)) for word in (AGREES, DIFFERS, IMPOSSIBLE)]
    return f"{len(cells)} figures: " + ", ".join(f"{count} {word}" for word, count in counts)


def _legend() -> str:
    limits = ", ".join(f"{tolerance:.0%} ({quantity})" for quantity, tolerance in TOLERANCE.items())
    return (
        f"agrees: within {limits} of the plan for the guide's own software. "
        "impossible: breaks a bound that no run can break. "
        "README: the official one's figure where it differs, its sums over several GPUs shown per GPU. "
        "Cards: GiB needed on the fullest of them, by the guide's software and by qwenfit."
    )
