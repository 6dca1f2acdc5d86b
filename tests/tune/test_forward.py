"""Packed samples do not see each other, and padding changes nothing."""

from __future__ import annotations

import pytest
import torch
from tune.tiny import network, samples, save_hf

from qwenfit.tune.adapters import LoRA, add_lora
from qwenfit.tune.batch import IGNORE, segment_lengths, targets_of
from qwenfit.tune.forward import batch_loss, hidden_states
from qwenfit.tune.loop import trained_tokens
from qwenfit.tune.source import Rows, collate


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return network(save_hf(tmp_path_factory.mktemp("tiny") / "base", kind="qwen3"))


def alone(model, sample):
    return batch_loss(model, collate([[sample]], len(sample.input_ids), 0), 1.0)


@pytest.mark.parametrize("width", [80, 83])
def test_a_packed_row_has_the_loss_of_its_samples_alone(model, width):
    few = samples(3, seed=4)
    for sample in few:
        sample.labels = list(sample.input_ids)  # also the first token, which nothing may predict
    rows = [few, few[:2]]
    packed = collate(rows, width, 0)
    wanted = sum(alone(model, s) for row in rows for s in row)
    torch.testing.assert_close(batch_loss(model, packed, 1.0), wanted, rtol=1e-5, atol=1e-4)
    assert trained_tokens(packed) == sum(len(s.input_ids) - 1 for row in rows for s in row)
    assert sum(segment_lengths(packed)) == 2 * width


def test_what_a_packed_neighbour_says_changes_nothing(model):
    first, second, other = samples(3, seed=6)
    with torch.no_grad():
        one = hidden_states(model, collate([[first, second]], 64, 0))
        two = hidden_states(model, collate([[first, other]], 64, 0))
        three = hidden_states(model, collate([[other, second]], 64, 0))
    n = len(first.input_ids)
    torch.testing.assert_close(one[:n], two[:n])
    start = len(other.input_ids)
    torch.testing.assert_close(one[n : n + len(second.input_ids)], three[start : start + len(second.input_ids)])


def test_padding_on_the_right_changes_no_loss(model):
    sample = samples(1, seed=8)[0]
    torch.testing.assert_close(batch_loss(model, collate([[sample]], 60, 0), 1.0), alone(model, sample))


def test_targets_are_the_next_token_within_the_sample(model):
    a, b = samples(2, seed=9)
    a.input_ids, a.labels = [5, 6, 7], [5, IGNORE, 7]
    b.input_ids, b.labels = [8, 9], [8, 9]
    batch = collate([[a, b]], 7, 0)
    assert targets_of(batch).tolist() == [[IGNORE, 7, IGNORE, 9, IGNORE, IGNORE, IGNORE]]
    assert batch.position_ids.tolist()[0][:5] == [0, 1, 2, 0, 1]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, -1, -1]]


@pytest.mark.parametrize("keep", ["inputs", "attention", "all"])
def test_dropout_is_the_same_when_a_layer_is_computed_again(model, tmp_path, keep):
    fresh = network(save_hf(tmp_path / "base", kind="qwen3"))
    torch.manual_seed(1)
    add_lora(fresh, LoRA(4, 8.0, 0.5))
    for name, parameter in fresh.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    fresh.train()
    batch = Rows([[s] for s in samples(2)], 24, 2, 0).batch(0, 0)
    torch.manual_seed(2)
    batch_loss(fresh, batch, 10.0, keep=keep).backward()
    grads = {n: p.grad for n, p in fresh.named_parameters() if p.grad is not None}
    for parameter in fresh.parameters():
        parameter.grad = None
    torch.manual_seed(2)
    batch_loss(fresh, batch, 10.0, keep="all").backward()
    assert grads and all(torch.equal(g, fresh.get_parameter(n).grad) for n, g in grads.items())


def test_the_order_of_an_epoch_follows_from_its_number():
    rows = Rows([[s] for s in samples(9)], 24, 2, 0, seed=3)
    again = Rows([[s] for s in samples(9)], 24, 2, 0, seed=3)
    assert len(rows) == 5

    def epoch(source, number):
        return [source.batch(number, i).sources for i in range(5)]

    first = epoch(rows, 0)
    assert sorted(name for names in first for name in names) == sorted(s.source for s in samples(9))
    assert epoch(rows, 1) != first == epoch(again, 0) == epoch(rows, 0)
