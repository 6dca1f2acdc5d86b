"""What int8 and int4 cost: the perplexity of the real model on 2,000 tokens of English and Python."""

from __future__ import annotations

import json.decoder
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from qwenfit.bench.perplexity import perplexity, token_losses
from qwenfit.engine.llm import LLM

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]  # minutes on a busy machine
TOKENS = 1000  # of each


@cache
def measured(path: Path, precision: str, kv_cache: str) -> float:
    """Of the language reference's first topics, and of a module, each a context of its own."""
    llm = LLM(str(path), precision=precision, kv_cache=kv_cache, device="cpu", max_model_len=1024, num_blocks=64)
    texts = ("\n\n".join(topics[name] for name in sorted(topics)), Path(json.decoder.__file__).read_text("utf-8"))
    return perplexity([loss for text in texts for loss in token_losses(llm, llm.tokenizer.encode(text)[:TOKENS])])


@pytest.mark.parametrize(
    ("precision", "kv_cache", "worse"),
    [("bf16", "int8", 0.005), ("int8", "bf16", 0.005), ("int4", "bf16", 0.15)],
)
def test_perplexity_against_bf16(real_gguf: Path, precision: str, kv_cache: str, worse: float) -> None:
    before, after = measured(real_gguf, "bf16", "bf16"), measured(real_gguf, precision, kv_cache)
    change = after / before - 1
    print(f"\n{precision} weights, {kv_cache} cache: {after:.4f}, all bf16: {before:.4f}, {100 * change:+.2f} %")
    assert 3 < before < 20 and change < worse
