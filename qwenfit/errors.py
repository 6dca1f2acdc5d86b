"""Every failure qwenfit expects: one sentence, its cause, the next command, and an exit code."""

from __future__ import annotations


class QwenfitError(Exception):
    """An expected failure.

    `message` is one sentence with the cause; `hint`, when given, is the next command (or the next thing) to try.
    The command line prints both without a traceback and exits with `exit_code`.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(QwenfitError):
    """An argument is unknown, absurd or contradicts another."""

    exit_code = 2


class DoesNotFit(QwenfitError):
    """The plan needs more memory than the hardware has."""

    exit_code = 3


class NotFound(QwenfitError):
    """A model, file, card or extra package is not there, or the network is not."""

    exit_code = 4


class BadFile(QwenfitError):
    """A file is malformed, truncated, lies about itself, or is of a kind that is not trusted."""

    exit_code = 5


class BeyondTolerance(QwenfitError):
    """A measurement and its plan differ by more than the tolerance."""

    exit_code = 6


def nearest(word: str, known: list[str], count: int = 3) -> list[str]:
    """The `count` known names closest to `word`, for "did you mean" hints."""
    import difflib

    lowered = {name.lower(): name for name in known}
    return [lowered[m] for m in difflib.get_close_matches(word.lower(), lowered, n=count, cutoff=0.4)]


# Packages that a verb may need beyond the base install, and the extra that brings each.
EXTRA_OF = {
    "torch": "run",
    "safetensors": "run",
    "tokenizers": "run",
    "tiktoken": "run",
    "jinja2": "run",
    "gguf": "gguf",
    "numpy": "gguf",
    "huggingface_hub": "hub",
    "yaml": "tune",
    "pyarrow": "tune",
    "deepspeed": "deepspeed",
}


def missing_extra(package: str, extra: str) -> NotFound:
    """The one error for an optional package that is not installed."""
    return NotFound(f"This needs the package {package}, which is not installed.", f"pip install 'qwenfit[{extra}]'")
