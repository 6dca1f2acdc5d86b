"""Perplexity of a text, teacher-forced through the paged cache: what a precision or a cache type costs in accuracy."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenfit.bench.record import Figure, Record, make_record
from qwenfit.bench.run import engine_facts, memory_figures
from qwenfit.errors import BadFile, NotFound, UsageError

if TYPE_CHECKING:
    import torch

    from qwenfit.engine.llm import LLM
    from qwenfit.run.planned import RunOptions

CHUNK = 128  # tokens of a step: small, so that most keys and values are read back from the cache, as in decoding
MAX_TEXT_BYTES = 64 * 2**20


def bench_perplexity(options: RunOptions, text: Path, window: int, tokens: int) -> Record:
    """Plan, load, and score the first `tokens` tokens of `text` in windows of `window` tokens that see only themselves.

    Figures: perplexity per token, bits per byte of the scored text, tokens/s. Raises UsageError, NotFound, BadFile.
    """
    from qwenfit.run.planned import load_planned

    if options.random_weights:
        raise UsageError("Random weights have no tokenizer and no perplexity.", "Name a folder, a Hub id or a .gguf.")
    content = read_text(text)
    llm, made = load_planned(replace(options, context=window, batch=1))
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode(content)[:tokens]
    if len(ids) < 2:
        raise UsageError(f"{text} has {len(ids)} tokens; a perplexity needs two.", "--text FILE")
    windows = [ids[start : start + window] for start in range(0, len(ids), window)]
    started = time.perf_counter()
    losses = [loss for part in windows for loss in token_losses(llm, part)]
    elapsed = time.perf_counter() - started
    scored = sum(len(llm.tokenizer.decode(part[1:]).encode()) for part in windows)
    figures = [
        Figure("perplexity", "per token", None, perplexity(losses)),
        Figure("bits_per_byte", "bits", None, sum(losses) / math.log(2) / scored),
        Figure("scored_tokens_per_s", "tokens/s", None, len(losses) / elapsed),
    ]
    facts: dict[str, Any] = {
        "text": text.name,
        "text_sha256": hashlib.sha256(content.encode()).hexdigest(),
        "tokens": len(ids),
        "scored_tokens": len(losses),
        "window": window,
        "chunk": CHUNK,
        "kv_cache": llm.engine.runner.cache.dtype,
        "head_precision": options.head_precision,
    }
    return make_record("perplexity", made, figures + memory_figures(llm, made), facts | engine_facts(llm))


def perplexity(losses: Sequence[float]) -> float:
    """exp of the mean negative log-likelihood (in nats)."""
    return math.exp(math.fsum(losses) / len(losses))


def token_losses(llm: LLM, ids: Sequence[int]) -> list[float]:
    """-log p(token | those before it), in nats, of every token but the first; `llm` must be idle.

    The tokens go through the cache in chunks, like a long prompt.
    """
    import torch

    from qwenfit.model.batch import Chunk, make_batch

    runner = llm.engine.runner
    cache, model, device = runner.cache, runner.model, runner.device
    blocks = range(-(-len(ids) // cache.block_size))
    alpha = llm.config.ntk_alpha(len(ids))
    losses: list[float] = []
    for start in range(0, len(ids) - 1, CHUNK):
        chunk = ids[start : start + CHUNK]
        batch = make_batch([Chunk(chunk, start, blocks, alpha, "all")], cache.block_size, device)
        following = torch.tensor(ids[start + 1 : start + 1 + CHUNK], device=device)
        with torch.inference_mode():
            hidden = model.forward(batch, cache, None)[: len(following)]
            losses += _cross_entropy(model.logits(hidden), following)
    return losses


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> list[float]:
    import torch.nn.functional as F

    out: list[float] = F.cross_entropy(logits.float(), targets, reduction="none").tolist()
    return out


def read_text(path: Path) -> str:
    """A UTF-8 text file. Raises NotFound and BadFile."""
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise BadFile(
                f"{path} has more than {MAX_TEXT_BYTES // 2**20} MiB.", "Cut the text; --tokens of it are used."
            )
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadFile(f"{path} is not UTF-8 text.") from error
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}.", "--text FILE") from error
