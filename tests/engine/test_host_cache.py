"""Requests that are stopped keep what they have computed in the host's memory."""

from __future__ import annotations

import numpy
import psutil
import pytest
import torch
from fakes import FakeModel, assert_empty, bytes_of, continue_alone, fake_engine, run_to_end, tiny_config, tokens_of

from qwenfit.engine.engine import check_whole
from qwenfit.engine.host_cache import HostCache
from qwenfit.engine.params import SamplingParams
from qwenfit.engine.sizes import free_host_bytes
from qwenfit.errors import UsageError
from qwenfit.model.kv_cache import KVCache

SIX = [[1, 2, 3, 4, 5 + i] for i in range(6)]


def answers(engine, model, prompts=SIX, count=40) -> list[int]:
    """Run the prompts and hold each answer against the one it has alone; how often each was stopped."""
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    ids = [engine.add(prompt, params) for prompt in prompts]
    made = run_to_end(engine)
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert tokens_of(made[request_id, 0]) == continue_alone(model, tiny_config(), prompt, count)
    assert_empty(engine)
    return [made[request_id, 0][-1].stats.preemptions for request_id in ids]


@pytest.mark.parametrize("lookahead", [False, True])
@pytest.mark.parametrize("prefix_cache", [False, True])
@pytest.mark.parametrize("num_blocks", [12, 13, 20])
def test_nothing_is_computed_twice(num_blocks, prefix_cache, lookahead):
    model = FakeModel()
    engine = fake_engine(num_blocks, model=model, swap_blocks=1000, prefix_cache=prefix_cache, lookahead=lookahead)
    stopped = answers(engine, model)
    assert max(stopped) >= 2 and engine.host.num_moved > 0
    once = sum(len(prompt) + 40 - 1 for prompt in SIX)
    beyond = 6 if lookahead else 0  # the token after an answer's last
    assert sum(model.token_counts) <= once + beyond
    if not prefix_cache:
        assert sum(model.token_counts) >= once


def test_without_room_on_the_host_it_is_computed_again():
    model, both = FakeModel(), []
    for swap_blocks in (0, 3, 1000):
        engine = fake_engine(12, model=model, swap_blocks=swap_blocks, prefix_cache=False)
        model.token_counts.clear()
        answers(engine, model)
        both.append(sum(model.token_counts))
    assert both[0] >= both[1] > both[2]


def test_what_is_still_on_the_host_is_not_copied_there_again():
    """As of a request that is stopped again before all of it is back."""
    model, moved = FakeModel(), [0, 0]
    engine = fake_engine(80, 2, model=model, swap_blocks=1000, prefix_cache=False, max_batched_tokens=64)
    host = engine.host
    host.back_at_once = 1
    move = host.move

    def counted(out, back):
        moved[0] += len(out)
        moved[1] += len(back)
        move(out, back)

    host.move = counted
    answers(engine, model, [[i, *range(20, 45)] for i in range(8)], 60)
    assert 0 < moved[0] < moved[1]


def test_a_cancelled_request_leaves_nothing_on_the_host():
    engine = fake_engine(12, swap_blocks=1000)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    ids = [engine.add(prompt, params) for prompt in SIX]
    while not any(request.slots and not request.running for request in engine.scheduler.waiting):
        engine.step()
    engine.abort(*ids)
    run_to_end(engine)
    assert_empty(engine)


def test_those_that_share_most_of_what_they_have_find_it_again():
    """Each its own copy of the others' beginning would leave room for few."""
    steps = []
    for swap_blocks in (0, 1000):
        model = FakeModel()
        engine = fake_engine(14, model=model, swap_blocks=swap_blocks)
        shared = list(range(1, 25))
        answers(engine, model, [*([*shared, 40 + i] for i in range(5)), [9] * 30], 24)
        steps.append(len(model.token_counts))
    assert steps[1] <= steps[0]


def test_what_others_have_too_does_not_come_back_twice():
    moved = []
    for prompts in (SIX, [[i, *prompt[1:]] for i, prompt in enumerate(SIX)]):  # with a block in common, and with none
        model = FakeModel()
        engine = fake_engine(12, model=model, swap_blocks=1000)
        answers(engine, model, prompts)
        moved.append(engine.host.num_moved)
    assert 0 < moved[0] < moved[1]


def test_whose_blocks_cannot_be_moved_ends_and_the_others_do_not(monkeypatch):
    model = FakeModel()
    engine = fake_engine(12, model=model, swap_blocks=1000, prefix_cache=False)
    move, failed = engine.host.move, []

    def once(out, back):
        if (out or back) and not failed:
            failed.append(len(out) + len(back))
            raise torch.OutOfMemoryError("no memory")
        move(out, back)

    monkeypatch.setattr(engine.host, "move", once)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    ids = [engine.add(prompt, params) for prompt in SIX]
    made = run_to_end(engine)
    reasons = [made[request_id, 0][-1].finish_reason for request_id in ids]
    assert reasons.count("error") == 1 and reasons.count("length") == 5
    for request_id, prompt in zip(ids, SIX, strict=True):
        tokens = tokens_of(made[request_id, 0])
        assert tokens == continue_alone(model, tiny_config(), prompt, 40)[: len(tokens)]
    assert_empty(engine)


@pytest.mark.parametrize("dtype", ["bf16", "int8", "fp32"])
def test_a_block_comes_back_as_it_was(dtype):
    config = tiny_config(num_layers=3)
    cache = KVCache(config, 8, 4, dtype)
    for view in cache.by_block:
        view.copy_(torch.randint(-(2**62), 2**62, view.shape))
    before = [view.clone() for view in cache.by_block]
    host = HostCache(cache, bytes_of(cache, 6))
    host.keep_free(6)
    assert (host.memory.most, host.memory.size) == (6, 6) and cache.nbytes == bytes_of(cache, 8)
    slots = host.take(5)
    assert host.take(2) is None and len(set(slots)) == 5
    host.move(list(zip([0, 2, 3, 5, 7], slots, strict=True)), [])
    for layer in cache.layers:
        layer.key.zero_(), layer.value.zero_()
        if layer.key_affine is not None:
            layer.key_affine.zero_(), layer.value_affine.zero_()
    host.move([], list(zip(slots, [7, 5, 3, 2, 0], strict=True)))
    for view, was in zip(cache.by_block, before, strict=True):
        assert torch.equal(view[[7, 5, 3, 2, 0]], was[[0, 2, 3, 5, 7]])
        assert not view[[1, 4, 6]].any()
    host.release(slots)
    host.keep_free(100)
    assert len(host.memory.free) == 6


def test_less_than_no_memory_is_refused():
    with pytest.raises(UsageError, match="swap_bytes is at least 0"):
        fake_engine(swap_blocks=-1)
    with pytest.raises(UsageError, match="swap_bytes is a whole number, and '8GB' was given"):
        check_whole(swap_bytes="8GB", max_queue=None)
    check_whole(swap_bytes=numpy.int64(8), max_queue=None)


def test_where_the_host_has_no_more_memory_it_makes_do(monkeypatch):
    cache = KVCache(tiny_config(), 8, 4)
    host = HostCache(cache, bytes_of(cache, 6))
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: (_ for _ in ()).throw(RuntimeError("no memory")))
    host.keep_free(3)
    assert (host.memory.most, host.memory.free, host.take(1)) == (0, [], None)


def test_memory_is_set_aside_only_where_requests_may_run_out_of_blocks():
    assert fake_engine(64, 4, max_num_seqs=4, max_model_len=64, swap_blocks=10).host is None
    assert fake_engine(63, 4, max_num_seqs=4, max_model_len=64, swap_blocks=10).host is not None
    assert free_host_bytes("cpu") == 0 < free_host_bytes("cuda") <= psutil.virtual_memory().total // 4
