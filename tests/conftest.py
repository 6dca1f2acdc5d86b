"""Shared fixtures."""

import os
import random
from pathlib import Path

import pytest
from hypothesis import register_random, settings

# Triton decides when it is first imported: without a GPU its kernels run in its interpreter.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

# Random inputs are those of SEED, which a failed run prints; without one each run looks for new ones. SEED=0 is CI's:
# what it refuses, the change broke. xdist's workers inherit it.
SEED = int(os.environ.setdefault("SEED", "0" if os.environ.get("CI") == "true" else str(random.randrange(1, 10**6))))
settings.register_profile("ci", derandomize=True, deadline=None)
if SEED == 0:
    settings.load_profile("ci")


class TorchRandom:
    """What hypothesis needs to give torch the same numbers whenever it repeats an example."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


TORCH_RANDOM = TorchRandom()  # kept: hypothesis holds a weak reference
register_random(TORCH_RANDOM)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.stats.get("failed") and SEED:
        terminalreporter.write_line(f"The same random inputs again: SEED={SEED}.")


@pytest.fixture(autouse=True)
def seeded() -> None:
    random.seed(SEED)
    torch.manual_seed(SEED)


GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def golden() -> Path:
    """Outputs of the original software; see tests/golden/README.md for how each was made."""
    return GOLDEN
