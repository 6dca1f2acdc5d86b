"""Shared fixtures."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Triton decides when it is first imported: without a GPU its kernels run in its interpreter.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The examples that hypothesis draws are the same in every CI run; elsewhere it goes on looking for new ones.
settings.register_profile("ci", derandomize=True, deadline=None)
if os.environ.get("CI") == "true":
    settings.load_profile("ci")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden() -> Path:
    """Outputs of the original software; see tests/golden/README.md for how each was made."""
    return GOLDEN
