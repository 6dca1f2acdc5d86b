"""Shared fixtures."""

import contextlib
import os
import random
from pathlib import Path

import pytest
from hypothesis import settings

# Triton decides when it is first imported: without a GPU its kernels run in its interpreter.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

with contextlib.suppress(ImportError, AttributeError):
    from triton.runtime.interpreter import interpreter_builder

    # It works out whether each sum of integers overflows, and then drops the answer: a quarter of the kernels' tests.
    object.__setattr__(interpreter_builder.options, "sanitize_overflow", False)

# Random inputs are those of SEED, which a failed run prints; without one each run looks for new ones. SEED=0 is CI's:
# what it refuses, the change broke. xdist's workers inherit it.
SEED = int(os.environ.get("SEED") or (0 if os.environ.get("CI") == "true" else random.randrange(1, 10**6)))
os.environ["SEED"] = str(SEED)
settings.register_profile("ci", derandomize=True, deadline=None)
if SEED == 0:
    settings.load_profile("ci")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if SEED and (terminalreporter.stats.get("failed") or terminalreporter.stats.get("error")):
        terminalreporter.write_line(f"The same random inputs again: SEED={SEED}; hypothesis keeps its own.")


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(SEED)
    torch.manual_seed(SEED)


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden() -> Path:
    """Outputs of the original software; see tests/golden/README.md for how each was made."""
    return GOLDEN
