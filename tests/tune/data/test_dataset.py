"""Rows to samples: lengths, weights, counts, and nothing that is lost without being said."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from qwenfit.errors import BadFile, UsageError
from qwenfit.tune.batch import IGNORE, Sample
from qwenfit.tune.data import reading
from qwenfit.tune.data.dataset import load_samples, overlap, split, split_weight, trained


def rows(*pairs):
    return "\n".join(json.dumps({"instruction": a, "output": b}) for a, b in pairs)


TEN = rows(*((f"Question {i}", f"Answer {i}") for i in range(10)))


def test_counts_are_what_the_samples_hold(write, small):
    path = write(rows(("Hello", "world"), ("a", "b c d e f g h i j k l")))
    got = load_samples([path], small, "assistant_only", 200)
    s = got.statistics
    assert (s.rows, s.conversations, s.samples) == (2, 2, 2)
    assert s.tokens == sum(len(x.input_ids) for x in got.samples)
    answers = [*small.encode("world"), *small.encode("b c d e f g h i j k l")]
    assert s.trained_tokens == len(answers) + 2  # and the end of each
    assert s.longest == len(got.samples[1].input_ids) and s.longest_source == f"{path}:2"
    assert (s.truncated, s.dropped, s.skipped, s.unused_turns) == (0, 0, 0, 0)
    assert f"({path}:2)" in s.summary() and len(s.summary().splitlines()) == 1


def test_a_long_sample_is_cut_dropped_or_refused_as_asked(write, small):
    path = write(rows(("a", "b"), ("a", "x y " * 90)))
    whole = load_samples([path], small, "assistant_only", 500).samples
    length = len(whole[0].input_ids) + 5
    cut = load_samples([path], small, "assistant_only", length)
    assert cut.samples[1].input_ids == whole[1].input_ids[:length]
    assert cut.samples[1].labels == whole[1].labels[:length]
    assert cut.statistics.truncated == 1 and cut.statistics.longest == len(whole[1].input_ids)
    assert "1 samples were too long and are cut" in cut.statistics.summary()
    dropped = load_samples([path], small, "assistant_only", length, on_long="drop")
    assert dropped.samples == whole[:1] and dropped.statistics.dropped == 1
    with pytest.raises(BadFile, match=f"{path}:2 has {len(whole[1].input_ids)} tokens"):
        load_samples([path], small, "assistant_only", length, on_long="error")


def test_a_sample_whose_answer_is_cut_away_is_an_error_that_names_it(write, small):
    path = write(rows(("a", "b"), ("x y " * 90, "b")))
    with pytest.raises(BadFile, match=f"{path}:2 has no trained token in its first 80 tokens"):
        load_samples([path], small, "assistant_only", 80)


def test_a_file_of_nothing_is_an_error(write, small):
    for content in ("", "\n \n"):
        with pytest.raises(BadFile, match="has no rows"):
            load_samples([write(content)], small, "all", 50)
    with pytest.raises(BadFile, match="has no row that can be used") as caught:
        load_samples([write("{")], small, "all", 50, skip_bad=True)
    assert "not JSON" in caught.value.hint
    with pytest.raises(BadFile, match="has no row that can be used") as caught:
        load_samples([write(TEN)], small, "all", 5, on_long="drop")
    assert "longer than --seq-len" in caught.value.hint


def test_bad_rows_stop_the_run_or_are_counted_and_named(write, small):
    path = write(rows(("a", "b")) + '\n{"x"\n' + '{"instruction": "a"}\n' * 30 + rows(("c", "d")))
    with pytest.raises(BadFile, match=f"{path}:2 is not JSON") as caught:
        load_samples([path], small, "all", 100)
    assert "--skip-bad" in caught.value.hint
    s = load_samples([path], small, "all", 100, skip_bad=True).statistics
    assert (s.rows, s.samples, s.skipped, len(s.bad)) == (33, 2, 31, 20)
    assert f"{path}:2 is not JSON" in s.bad[0] and f"{path}:3: The row has no output" in s.bad[1]
    assert "31 bad rows are left out" in s.summary() and "and 11 more." in s.summary()


def test_what_the_mask_cannot_take_names_the_line(write, small):
    chat = {"messages": [{"role": "user", "content": "a"}]}
    path = write(json.dumps(chat))
    with pytest.raises(BadFile, match=f"{path}:1: No turn of an assistant"):
        load_samples([path], small, "assistant_only", 100)
    answered = {"messages": [*chat["messages"], {"role": "assistant", "content": "b"}, *chat["messages"]]}
    s = load_samples([write(json.dumps(answered))], small, "assistant_only", 100).statistics
    assert s.unused_turns == 1 and "1 turns have no effect" in s.summary()


@pytest.mark.parametrize("seq_len", [2, 3, 7, 50, 500])
@pytest.mark.parametrize("mask", ["all", "assistant_only"])
@pytest.mark.parametrize("block", [8, 1 << 20])
def test_every_token_of_a_text_is_predicted_once_whatever_the_length(block, seq_len, mask, write, small, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", block)
    text = "Hello, world! 你好\n" * 6
    got = load_samples([write(text, "data.txt")], small, mask, seq_len)
    whole = [*small.encode(text), small.special_id("<|endoftext|>")]
    predicted = [i for s in got.samples for i in s.labels[1:]]
    assert [got.samples[0].input_ids[0], *predicted] == whole
    assert got.statistics.trained_tokens == len(whole) - 1
    assert all(2 <= len(s.input_ids) <= seq_len and s.labels == s.input_ids for s in got.samples)
    assert got.statistics.longest == len(whole) and got.statistics.conversations == 0 and got.statistics.rows == 1


@pytest.mark.parametrize(
    ("weight", "counts"), [("1", {1: 10}), ("0.5", {1: 5}), ("2.3", {2: 7, 3: 3}), ("0.01", {1: 1})]
)
def test_a_weight_takes_a_share_of_a_file_or_repeats_it(weight, counts, write, small):
    path = write(TEN)
    got = load_samples([f"{path}@{weight}"], small, "all", 100, seed=4).samples
    assert Counter(Counter(s.source for s in got).values()) == counts
    again = load_samples([f"{path}@{weight}"], small, "all", 100, seed=4).samples
    assert [s.source for s in got] == [s.source for s in again]


def test_the_seed_chooses_which_rows_a_share_holds(write, small):
    path = write(TEN)
    chosen = [load_samples([f"{path}@0.5"], small, "all", 100, seed=i).samples for i in range(5)]
    assert len({tuple(s.source for s in each) for each in chosen}) > 1


def test_several_files_follow_each_other(write, small):
    paths = [write(TEN, "a.jsonl") + "@0.5", write("text", "b.txt"), write(TEN, "c@2.jsonl")]
    got = load_samples(paths, small, "all", 100)
    assert [s.source.rpartition("/")[2][0] for s in got.samples] == ["a"] * 5 + ["b"] + ["c"] * 10
    assert got.statistics.rows == 21 and got.statistics.conversations == 20


def test_a_name_that_looks_weighted_is_taken_as_it_is(write):
    path = write(TEN, "data@2")
    assert split_weight(path)[1] == 1.0
    assert split_weight(f"{path}@0.25")[1] == 0.25
    for weight in ("0", "1001"):
        with pytest.raises(UsageError, match="weight"):
            split_weight(f"x.json@{weight}")


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"mask": "some"}, "mask"), ({"seq_len": 1}, "seq_len"), ({"on_long": "shrug"}, "on_long")],
)
def test_arguments_are_checked_before_a_file_is_opened(options, reason, small):
    values = {"mask": "all", "seq_len": 8} | options
    with pytest.raises(UsageError, match=reason):
        load_samples(["absent.json"], small, values.pop("mask"), values.pop("seq_len"), **values)


def test_trained_leaves_out_the_first_token():
    assert trained([5, 6, IGNORE, 7]) == 2
    assert trained([5, IGNORE]) == trained([5]) == trained([]) == 0


def sample(i, source):
    return Sample([i, 1], [i, 1], source)


def test_a_split_keeps_the_samples_of_a_row_together():
    all_of_them = [sample(i % 7, f"f:{i % 40}") for i in range(100)]
    left, right = split(all_of_them, 0.25, seed=1)
    assert len({s.source for s in right}) == 10 and not {s.source for s in left} & {s.source for s in right}
    assert sorted(map(id, left + right)) == sorted(map(id, all_of_them))
    assert split(all_of_them, 0.25, seed=1) == (left, right) != split(all_of_them, 0.25, seed=2)
    for share in (0.001, 0.999):
        with pytest.raises(UsageError, match="leaves nothing"):
            split(all_of_them, share, seed=1)


def test_rows_of_the_evaluation_that_were_trained_on_are_found():
    training = [sample(1, "a:1"), sample(2, "a:2")]
    assert overlap(training, [sample(2, "b:1"), sample(3, "b:2"), sample(2, "b:1"), sample(1, "b:9")]) == ["b:1", "b:9"]
