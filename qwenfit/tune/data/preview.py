"""`qwenfit tune --preview`: samples as text in which one sees what is trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

from qwenfit.checkpoint.tokenizer import Tokenizer
from qwenfit.tune.batch import IGNORE, Sample
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.data.dataset import trained
from qwenfit.tune.loop import total_steps
from qwenfit.tune.source import Rows

MAX_TOKENS = 2000  # shown of one sample
GREEN, GREY, RESET = "\x1b[32m", "\x1b[90m", "\x1b[0m"
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def preview_text(samples: Sequence[Sample], tokenizer: Tokenizer, count: int, colour: bool) -> str:
    """The first `count` samples, trained tokens in green or, without colour, between ⟦ and ⟧, and counts.

    Characters of the data that would steer the terminal are shown as escapes; a line end is ↵.
    """
    tokens = sum(len(sample.input_ids) for sample in samples)
    learned = sum(trained(sample.labels) for sample in samples)
    parts = [_one(sample, tokenizer, colour) for sample in samples[:count]]
    parts.append(f"{min(count, len(samples)):,} of {len(samples):,} samples; {tokens:,} tokens, {learned:,} trained.")
    return "\n\n".join(parts)


def steps_text(config: TuneConfig, rows: Rows, processes: int) -> str:
    """One line: the rows that samples are laid into, how full they are, and the steps that a run makes of them."""
    samples = [sample for row in rows.rows for sample in row]
    tokens = sum(len(sample.input_ids) for sample in samples)
    learned = sum(trained(sample.labels) for sample in samples)
    steps = total_steps(config, len(rows), processes)
    per_step = config.grad_accum * processes
    taken = steps * per_step if config.max_steps is not None else min(config.epochs * len(rows), steps * per_step)
    return (
        f"{len(samples):,} samples {'packed into' if config.pack else 'in'} {len(rows.rows):,} rows of at most "
        f"{config.seq_len:,} tokens ({tokens / len(rows.rows) / config.seq_len:.0%} full); {len(rows):,} micro-batches "
        f"of {config.micro_batch:,} an epoch; {steps:,} steps, each of about "
        f"{learned / len(rows) * taken / steps:,.0f} trained tokens."
    )


def _one(sample: Sample, tokenizer: Tokenizer, colour: bool) -> str:
    total = len(sample.input_ids)
    text = f"{_safe(sample.source)}: {total:,} tokens, {trained(sample.labels):,} trained\n"
    pairs = zip(sample.input_ids[:MAX_TOKENS], sample.labels[:MAX_TOKENS], strict=True)
    for learned, run in groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        words = _safe(tokenizer.decode((i for i, _ in run), skip_special=False)).replace("\n", "↵\n")
        if colour:
            text += f"{GREEN if learned else GREY}{words}{RESET}"
        else:
            text += f"⟦{words}⟧" if learned else words
    return text + (f"\n... and {total - MAX_TOKENS:,} tokens more" if total > MAX_TOKENS else "")


def _safe(text: str) -> str:
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
