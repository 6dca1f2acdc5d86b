"""Every command in docs/ and the README is one that the command line takes; those that only compute are run."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import pytest

from qwenfit.cli import app, main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMPUTE = ("plan", "guide", "models")


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every indented line that calls qwenfit, up to a pipe or a redirection."""
    found = []
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").splitlines():
            for part in line.split("|") if line.startswith("    ") else ():
                if part.strip().startswith("qwenfit "):
                    found.append((page.name, shlex.split(part.partition(" > ")[0])[1:]))
    return found


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_a_documented_command_is_taken(page: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if words[0] in COMPUTE and "--gpu" in words + ["--gpu"] * (words[0] != "plan"):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code in (0, 3), capsys.readouterr().err
        return
    with click.Context(app) as group:
        command = app.get_command(group, words[0])
        assert command is not None, words[0]
        command.make_context(words[0], words[1:], parent=group)  # raises for an unknown option or a missing argument


def test_each_verb_has_a_page() -> None:
    pages = {page.stem for page in PAGES}
    assert {"plan", "chat", "generate", "bench", "compare", "convert", "doctor", "guide"} <= pages
    assert len(commands()) > 30
