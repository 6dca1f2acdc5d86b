"""Shared fixtures."""

import os
from pathlib import Path

import pytest

# Triton decides when it is first imported: without a GPU its kernels run in its interpreter.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden() -> Path:
    """Outputs of the original software; see tests/golden/README.md for how each was made."""
    return GOLDEN
