"""The data of a run, as the trainer takes it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from fixtures_tokenizer import make_config

from qwenfit.errors import UsageError
from qwenfit.tune.batch import IGNORE, targets_of
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.data.load import load_data

ROWS = "\n".join(json.dumps({"instruction": f"Q{i}", "output": "A" * (i + 1)}) for i in range(12))


@pytest.fixture
def load(small_folder):
    model = replace(make_config(1000), source=str(small_folder))

    def call(config):
        said = []
        return load_data(TuneConfig("tiny", seq_len=128, micro_batch=4, **config), model, said.append), said

    return call


def learned(source):
    """The trained tokens of an epoch, sorted."""
    found = []
    for index in range(len(source)):
        targets = targets_of(source.batch(0, index))
        found += targets[targets != IGNORE].tolist()
    return sorted(found)


def test_padded_packed_and_narrow_batches_train_the_same_tokens(load, write, small):
    path = write(ROWS)
    padded, said = load({"data": (path,)})
    packed, _ = load({"data": (path,), "pack": True})
    narrow, _ = load({"data": (path,), "pad": False})
    assert learned(padded.source) == learned(packed.source) == learned(narrow.source)
    assert "12 rows, 12 samples" in said[0] and len(said) == 1
    batch = padded.source.batch(0, 0)
    assert batch.input_ids.shape == (4, 128) and batch.segment_ids is None
    assert batch.input_ids[0, -1] == small.special_id("<|endoftext|>")
    assert len(packed.source) < len(padded.source) == 3
    widths = {narrow.source.batch(0, i).input_ids.shape[1] for i in range(3)}
    assert all(w % 8 == 0 and w < 128 for w in widths)
    assert padded.chatml and padded.new_tokens == (small.special_id("<|im_start|>"), small.special_id("<|im_end|>"))


def test_text_is_no_chatml(load, write):
    data, _ = load({"data": (write("some text", "data.txt"),)})
    assert not data.chatml and data.new_tokens == () and data.evaluation is None


def test_evaluation_from_its_own_file_or_a_share_and_what_both_have_is_said(load, write):
    path, other = write(ROWS), write(ROWS.splitlines()[3], "eval.jsonl")
    data, said = load({"data": (path,), "eval_data": (other,)})
    assert len(data.evaluation) == 1
    assert said[-1] == f"Warning: 1 rows of the evaluation are in the training data too: {other}:1."
    data, said = load({"data": (path,), "eval_share": 0.34})
    assert (len(data.source), len(data.evaluation), len(said)) == (2, 1, 1)
    assert data.evaluation.batch(0, 0).sources == data.evaluation.batch(1, 0).sources
    with pytest.raises(UsageError, match="no share"):
        load({"data": (path,), "eval_data": (other,), "eval_share": 0.5})


def test_the_digest_of_the_data_is_that_of_its_samples(load, write):
    first, again = (load({"data": (write(ROWS, name),)})[0].digest for name in ("a.jsonl", "b.jsonl"))
    other = load({"data": (write(ROWS.replace("Q3", "Q4"), "c.jsonl"),)})[0].digest
    masked = load({"data": (write(ROWS, "d.jsonl"),), "mask": "all"})[0].digest
    assert first == again and len({first, other, masked}) == 3


def test_no_data_is_said(load):
    with pytest.raises(UsageError, match="No data"):
        load({})
