"""Shared fixtures."""

from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden() -> Path:
    """Outputs of the original software; see tests/golden/README.md for how each was made."""
    return GOLDEN
