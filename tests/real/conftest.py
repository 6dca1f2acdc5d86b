"""The real model, loaded once in float32: its answers are then those of its weights alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures_tokenizer import real_gguf

from qwenfit.engine.llm import LLM

__all__ = ["real_gguf"]


@pytest.fixture(scope="session")
def real(real_gguf: Path) -> LLM:
    """Qwen2.5-Coder-0.5B-Instruct, weights and cache in float32, for 32 requests at once."""
    return LLM(str(real_gguf), precision="fp32", device="cpu", max_num_seqs=32, max_model_len=1024, num_blocks=1024)
