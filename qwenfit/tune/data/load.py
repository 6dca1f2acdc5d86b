"""The data of a run: its files read, labelled and laid into rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qwenfit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from qwenfit.config import ModelConfig
from qwenfit.errors import UsageError
from qwenfit.tune.base_model import CHATML
from qwenfit.tune.batch import Sample
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.data.dataset import END_OF_TEXT, Dataset, digest, load_samples, overlap, split
from qwenfit.tune.data.packing import pack
from qwenfit.tune.run import Data
from qwenfit.tune.source import Rows


def load_data(
    config: TuneConfig,
    model: ModelConfig,
    say: Callable[[str], None],
) -> Data:
    """What `tune` trains on and evaluates with; `say` gets the counts and what is odd. Raises as `load_samples`."""
    if not config.data:
        raise UsageError("No data is named.", "qwenfit tune MODEL --data FILE")
    tokenizer = load_tokenizer(Path(model.source), model)

    def read(paths: tuple[str, ...]) -> Dataset:
        found = load_samples(
            paths, tokenizer, config.mask, config.seq_len,
            form=config.format, on_long=config.on_long, skip_bad=config.skip_bad, seed=config.seed,
        )  # fmt: skip
        say(found.statistics.summary())
        return found

    training = read(config.data)
    samples, evaluation = training.samples, []
    if config.eval_data:
        evaluation = read(config.eval_data).samples
    elif config.eval_share:
        samples, evaluation = split(samples, config.eval_share, config.seed)
    if both := overlap(samples, evaluation):
        shown = ", ".join(both[:8]) + (f" and {len(both) - 8:,} more" if len(both) > 8 else "")
        say(f"Warning: {len(both):,} rows of the evaluation are in the training data too: {shown}.")

    chatml = training.statistics.conversations > 0
    return Data(
        rows_of(config, samples, tokenizer),
        rows_of(config, evaluation, tokenizer, shuffle=False) if evaluation else None,
        chatml,
        tuple(tokenizer.special_id(text) for text in CHATML) if chatml else (),
        digest(samples),
    )


def rows_of(config: TuneConfig, samples: list[Sample], tokenizer: Tokenizer, shuffle: bool = True) -> Rows:
    """Samples laid into rows, packed or one in each, as a run takes them."""
    made = pack(samples, config.seq_len) if config.pack else [[sample] for sample in samples]
    fill = tokenizer.special_id(END_OF_TEXT)
    return Rows(made, config.seq_len, config.micro_batch, fill, seed=config.seed, shuffle=shuffle, pad=config.pad)
