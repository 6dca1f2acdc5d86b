"""What the `tune` verb does with its settings: show samples, or run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

from qwenfit.checkpoint.load import with_files
from qwenfit.checkpoint.tokenizer import load_tokenizer
from qwenfit.config import ModelConfig
from qwenfit.errors import UsageError
from qwenfit.planning.planner import resolve
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.data.dataset import load_samples, split
from qwenfit.tune.data.load import load_data, rows_of
from qwenfit.tune.data.preview import preview_text, steps_text
from qwenfit.tune.processes import processes, rank
from qwenfit.tune.progress import summary
from qwenfit.tune.run import Data, start

Say = Callable[[str], None]


def run(config: TuneConfig, say: Say, as_json: Say | None = None) -> int:
    """Finetune; returns the exit code. as_json: gets the run's summary at its end."""

    def load(config: TuneConfig, base: ModelConfig) -> Data:
        return load_data(config, base, say if rank() == 0 else lambda text: None)

    def ended(code: int) -> None:
        if as_json is not None:
            as_json(json.dumps(summary(config, code), indent=2, ensure_ascii=False))

    return start(config, load, say, ended)


def preview_samples(config: TuneConfig, count: int, echo: Say) -> int:
    """Show samples as they would be trained. Reads the tokenizer and the data, no weights."""
    if not config.data:
        raise UsageError("No data is named.", "qwenfit tune MODEL --data FILE --preview 3")
    base = with_files(resolve(config.model), config.model)
    tokenizer = load_tokenizer(base.source, base)
    found = load_samples(
        config.data, tokenizer, config.mask, config.seq_len,
        form=config.format, on_long=config.on_long, skip_bad=config.skip_bad, seed=config.seed,
    )  # fmt: skip
    samples = split(found.samples, config.eval_share, config.seed)[0] if config.eval_share else found.samples
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    echo(preview_text(samples, tokenizer, count, colour))
    echo(found.statistics.summary())
    echo(steps_text(config, rows_of(config, samples, tokenizer), processes()[1]))
    return 0
