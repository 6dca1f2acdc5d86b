"""Files to labelled samples: every row becomes one, or is named; what was cut, left out or repeated is counted."""

from __future__ import annotations

import random
import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from qwenfit.checkpoint.bounded import shown
from qwenfit.checkpoint.tokenizer import Tokenizer
from qwenfit.errors import BadFile, UsageError
from qwenfit.planning.task import check_choice, check_count
from qwenfit.tune.batch import IGNORE, Sample
from qwenfit.tune.config import MASKS, ON_LONG
from qwenfit.tune.data.formats import Record, read_records
from qwenfit.tune.data.masks import Labelled, encode_conversation

END_OF_TEXT = "<|endoftext|>"
MAX_WEIGHT = 1000.0
SHOWN_BAD = 20
_WEIGHTED = re.compile(r"(.+)@(\d+(?:\.\d+)?)")


@dataclass
class Statistics:
    """What became of the rows. Tokens are counted as they are trained on, weights of files included."""

    rows: int = 0
    conversations: int = 0  # rows that are no raw text
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0  # the first token of a sample, which nothing predicts, is none
    longest: int = 0  # tokens, before anything is cut
    longest_source: str = ""
    truncated: int = 0  # samples
    dropped: int = 0  # samples that were too long
    unused_turns: int = 0  # that add nothing to any loss: a user's at the end, with qwen1 an assistant's at the start
    skipped: int = 0  # rows
    bad: list[str] = field(default_factory=list)  # why, of the first skipped rows

    def summary(self) -> str:
        """One line, then one for each thing that was cut or left out."""
        share = self.trained_tokens / max(1, self.tokens)
        lines = [
            f"{self.rows:,} rows, {self.samples:,} samples, {self.tokens:,} tokens, {self.trained_tokens:,} of them "
            f"trained ({share:.0%}); the longest has {self.longest:,} ({self.longest_source})."
        ]
        if self.truncated:
            lines.append(f"{self.truncated:,} samples were too long and are cut.")
        if self.dropped:
            lines.append(f"{self.dropped:,} samples were too long and are left out.")
        if self.unused_turns:
            lines.append(f"{self.unused_turns:,} turns have no effect: questions without an answer, or the reverse.")
        if self.skipped:
            lines += [f"{self.skipped:,} bad rows are left out:", *self.bad]
            lines += [f"and {self.skipped - len(self.bad):,} more."] * (self.skipped > len(self.bad))
        return "\n".join(lines)


@dataclass
class Dataset:
    samples: list[Sample]
    statistics: Statistics


def load_samples(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    mask: str,
    seq_len: int,
    *,
    form: str | None = None,
    on_long: str = "truncate",
    skip_bad: bool = False,
    seed: int = 0,
) -> Dataset:
    """The samples of files, in their order, each of at most `seq_len` tokens.

    paths: `FILE` or `FILE@WEIGHT`; a weight of 2.5 takes all samples twice and half of them, chosen by `seed`, again.
    form: one of formats.FORMATS, None to see from each file. on_long: what a conversation of more tokens meets; raw
    text is cut into pieces and none of it is lost. skip_bad: leave bad rows out and count them.

    Raises BadFile that names the line of a bad row, of a sample that is too long where `on_long` is "error", and of one
    without a trained token; UsageError for an argument, NotFound for a file.
    """
    check_choice("mask", mask, MASKS)
    check_choice("on_long", on_long, ON_LONG)
    check_count("seq_len", seq_len, least=2)
    reader = _Reader(tokenizer, mask, seq_len, on_long, skip_bad)
    samples: list[Sample] = []
    for name in paths:
        path, weight = split_weight(name)
        before = reader.statistics.rows
        mine = list(reader.read(path, form))
        if not mine:
            raise _nothing(path, reader.statistics, before)
        samples += _weighted(mine, weight, f"{seed}:{path}")
    statistics = reader.statistics
    statistics.samples = len(samples)
    statistics.tokens = sum(len(sample.input_ids) for sample in samples)
    statistics.trained_tokens = sum(trained(sample.labels) for sample in samples)
    return Dataset(samples, statistics)


def _nothing(path: Path, statistics: Statistics, rows_before: int) -> BadFile:
    if statistics.rows == rows_before:
        return BadFile(f"{shown(path)} has no rows.")
    why = statistics.bad[-1:] or ["Every sample is longer than --seq-len."]
    return BadFile(f"{shown(path)} has no row that can be used.", why[0])


def trained(labels: Sequence[int]) -> int:
    """Tokens that a loss is computed for: the first has none before it to predict it from."""
    return len(labels) - 1 - labels[1:].count(IGNORE) if labels else 0


def split_weight(name: str) -> tuple[Path, float]:
    """`FILE@WEIGHT` apart; a file whose own name looks so has the weight 1. Raises UsageError for an absurd weight."""
    match = _WEIGHTED.fullmatch(name)
    if match is None or Path(name).exists():
        return Path(name), 1.0
    weight = float(match[2])
    if not 0 < weight <= MAX_WEIGHT:
        raise UsageError(f"The weight of {shown(match[1])} must be above 0 and at most {MAX_WEIGHT:g}, not {match[2]}.")
    return Path(match[1]), weight


def _weighted(samples: list[Sample], weight: float, seed: str) -> list[Sample]:
    """Whole copies, then a part, drawn without repetition and kept in order; at least one sample."""
    whole = int(weight)
    part = round((weight - whole) * len(samples))
    if whole == 0:
        part = max(1, part)
    chosen = sorted(random.Random(seed).sample(range(len(samples)), part))
    return samples * whole + [samples[i] for i in chosen]


class _Reader:
    """Reads files into samples, counting what happens."""

    def __init__(self, tokenizer: Tokenizer, mask: str, seq_len: int, on_long: str, skip_bad: bool) -> None:
        self.tokenizer, self.mask, self.seq_len = tokenizer, mask, seq_len
        self.on_long, self.skip_bad = on_long, skip_bad
        self.statistics = Statistics()
        self.same: dict[int, int] = {}  # one object for each token id, not one for each token
        self.begun: list[int] = []  # of a document that goes on in the next record: the tokens of its last piece
        self.document = 0  # its tokens so far

    def read(self, path: Path, form: str | None) -> Iterator[Sample]:
        for record in read_records(path, form):
            self.statistics.rows += isinstance(record, BadFile) or record.ends  # parts of a text are one
            try:
                if isinstance(record, BadFile):
                    raise record
                yield from self._samples(record)
            except BadFile as error:
                if not self.skip_bad:
                    hint = "Correct the row, or leave such rows out with --skip-bad, which counts them."
                    raise BadFile(error.message, error.hint or hint) from None
                self.statistics.skipped += 1
                if len(self.statistics.bad) < SHOWN_BAD:
                    self.statistics.bad.append(error.message)

    def _samples(self, record: Record) -> list[Sample]:
        """The samples of one row: several of a long text, or where a template rewrites what was said earlier."""
        if not record.messages:
            return [self._sample(piece, record.source) for piece in self._pieces(record)]
        try:
            encoded = encode_conversation(self.tokenizer, record.messages, record.tools, self.mask)
        except UsageError as error:
            raise BadFile(f"{record.source}: {error.message}", error.hint) from None
        fitting = [self._fitted(labelled, record.source) for labelled in encoded.samples]
        kept = [self._sample(labelled, record.source) for labelled in fitting if labelled is not None]
        statistics = self.statistics
        statistics.conversations += 1
        statistics.unused_turns += encoded.unused_turns
        statistics.dropped += fitting.count(None)
        if self.on_long == "truncate":
            statistics.truncated += sum(len(labelled.ids) > self.seq_len for labelled in encoded.samples)
        return kept

    def _pieces(self, record: Record) -> Iterator[Labelled]:
        """A text in pieces of at most seq_len tokens, all trained. Each begins with the last token of the one before.

        That token predicts the first new one, so that every token but the document's first is predicted once.
        """
        new = self.tokenizer.encode(record.text)
        if record.ends:
            new.append(self.tokenizer.special_id(END_OF_TEXT))
        self.document += len(new)
        self._note_length(self.document, record.source)
        ids, start = self.begun + new, 0
        while len(ids) - start > self.seq_len or (record.ends and len(ids) - start > 1):
            piece = ids[start : start + self.seq_len]
            yield Labelled(piece, piece)
            start += self.seq_len - 1
        self.begun = [] if record.ends else ids[start:]
        self.document = 0 if record.ends else self.document

    def _fitted(self, labelled: Labelled, source: str) -> Labelled | None:
        """The sample as long as it may be, None when it is to be dropped."""
        length = len(labelled.ids)
        self._note_length(length, source)
        if length <= self.seq_len:
            return labelled
        if self.on_long == "error":
            raise BadFile(
                f"{source} has {length:,} tokens, more than the {self.seq_len:,} of a sample.",
                "Raise --seq-len, or choose --on-long truncate or drop.",
            )
        if self.on_long == "drop":
            return None
        return Labelled(labelled.ids[: self.seq_len], labelled.labels[: self.seq_len])

    def _note_length(self, length: int, source: str) -> None:
        if length > self.statistics.longest:
            self.statistics.longest, self.statistics.longest_source = length, source

    def _sample(self, labelled: Labelled, source: str) -> Sample:
        if not trained(labelled.labels):
            if len(labelled.ids) < self.seq_len:
                raise BadFile(f"{source} has no trained token.")
            raise BadFile(
                f"{source} has no trained token in its first {self.seq_len:,} tokens.",
                "Raise --seq-len, or leave out what is too long with --on-long drop, which counts it.",
            )
        same = self.same
        ids = [same.setdefault(i, i) for i in labelled.ids]
        labels = [IGNORE if label == IGNORE else i for i, label in zip(ids, labelled.labels, strict=True)]
        return Sample(ids, labels, source)


def split(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(for training, for evaluation): about `share` of the rows for evaluation, chosen by `seed`, both in order.

    All samples of one row, copies included, stay on one side. Raises UsageError when a side would be empty.
    """
    sources = sorted({sample.source for sample in samples})
    count = round(share * len(sources))
    if not 0 < count < len(sources):
        raise UsageError(f"A share of {share:g} of {len(sources):,} rows leaves nothing on one side.")
    chosen = set(random.Random(f"{seed}:split").sample(sources, count))
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        sides[sample.source in chosen].append(sample)
    return sides


def overlap(training: Iterable[Sample], evaluation: Iterable[Sample]) -> list[str]:
    """Sources of the evaluation's samples whose tokens the training set has too: their loss says nothing."""
    seen = {_digest(sample) for sample in training}
    return list(dict.fromkeys(sample.source for sample in evaluation if _digest(sample) in seen))


def digest(samples: Iterable[Sample]) -> str:
    """Of what is trained, in its order: a resumed run must find the same."""
    whole = blake2b(digest_size=16)
    for sample in samples:
        whole.update(_digest(sample))
        whole.update(array("q", sample.labels).tobytes())
    return whole.hexdigest()


def _digest(sample: Sample) -> bytes:
    return blake2b(array("q", sample.input_ids).tobytes(), digest_size=16).digest()
