"""LLM: the door. With the real network at tiny size and a tokenizer of words."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from fakes import WORDS, FakeTokenizer, assert_empty, tiny_config

from qwenfit.engine.llm import LLM
from qwenfit.engine.params import SamplingParams
from qwenfit.engine.sizes import num_blocks_for
from qwenfit.errors import DoesNotFit, UsageError
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.transformer import Transformer

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def llm() -> LLM:
    torch.manual_seed(0)
    config = tiny_config()
    model = Transformer(config, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return LLM.from_parts(model, config, FakeTokenizer(), num_blocks=64, kv_cache="fp32", max_num_seqs=4)


def test_generate_takes_texts_and_ids_and_keeps_their_order(llm):
    outputs = llm.generate(["one", [1, 2, 3], "another text"], GREEDY)
    assert [o.prompt_token_ids for o in outputs] == [
        llm.tokenizer.encode("one"),
        [1, 2, 3],
        llm.tokenizer.encode("another text"),
    ]
    for output in outputs:
        assert output.token_ids == llm.generate([output.prompt_token_ids], GREEDY)[0].token_ids
        assert output.text == "".join(llm.tokenizer.words[t] for t in output.token_ids)
        assert output.finish_reason == "length" and output.stats.completion_tokens == 6
    assert_empty(llm.engine)


def test_one_prompt_alone_is_a_list_of_one(llm):
    assert len(llm.generate("one", GREEDY)) == len(llm.generate([1, 2, 3], GREEDY)) == 1
    assert llm.generate([], GREEDY) == []


def test_params_for_each(llm):
    params = [SamplingParams(max_tokens=i + 1, n=i + 1, seed=i, ignore_eos=True, logprobs=i) for i in range(3)]
    for i, output in enumerate(llm.generate([[5], [6], [7]], params)):
        assert [c.index for c in output.completions] == list(range(i + 1))
        assert all(len(c.token_ids) == len(c.logprobs) == i + 1 for c in output.completions)
        assert all(len(p.top) == i for c in output.completions for p in c.logprobs)
    with pytest.raises(UsageError, match="3 prompts and 2"):
        llm.generate([[1], [2], [3]], [GREEDY, GREEDY])


def test_the_longest_answers_are_begun_first(llm):
    """Whatever the order of the prompts; outputs keep it."""
    begun = []
    add = llm.engine.add
    llm.engine.add = lambda prompt, *a, **k: begun.append(list(prompt)) or add(prompt, *a, **k)
    counts = [2, 9, 4]
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in counts]
    outputs = llm.generate([[5], [6], [7]], params)
    assert begun == [[6], [7], [5]]
    assert [len(output.token_ids) for output in outputs] == counts


def test_nothing_of_an_engine_waits_for_the_garbage_collector():
    """On a GPU what is there when it starts is left out of collections, and a cache is most of the card."""
    config = tiny_config()
    llm = LLM.from_parts(Transformer(config, torch.float32), config, FakeTokenizer(), num_blocks=8, kv_cache="fp32")
    llm.generate(["one", "two"], GREEDY)
    parts = [weakref.ref(part) for part in (llm.engine, llm.engine.runner.cache, llm.engine.runner.model)]
    gc.disable()
    try:
        del llm
        assert [part() for part in parts] == [None] * 3
    finally:
        gc.enable()


def test_streamed_deltas_join_to_the_answer(llm):
    prompts = ["one", "two", [9, 9, 9]]
    whole = llm.generate(prompts, GREEDY)
    joined = [""] * 3
    for delta in llm.generate(prompts, GREEDY, stream=True):
        joined[delta.request_id] += delta.text
    assert joined == [o.text for o in whole]


def test_two_streams_read_in_turn(llm):
    alone = [llm.generate(p, GREEDY)[0].token_ids for p in ("one", "two")]
    streams = [llm.generate(p, GREEDY, stream=True) for p in ("one", "two")]
    made: list[list[int]] = [[], []]
    for _ in range(6):
        for tokens, deltas in zip(made, streams, strict=True):
            tokens += next(deltas).token_ids
    assert made == alone
    for deltas in streams:
        assert list(deltas) == []
    assert_empty(llm.engine)


def test_a_closed_stream_leaves_nothing_running(llm):
    deltas = llm.generate(["one"] * 9, SamplingParams(ignore_eos=True), stream=True)
    next(deltas)
    deltas.close()
    assert not llm.engine.scheduler.running and not llm.engine.scheduler.waiting and not llm._inboxes
    assert len(llm.generate("one", GREEDY)[0].token_ids) == 6
    assert_empty(llm.engine)


@pytest.mark.parametrize("where", ["network", "books", "last step"])
def test_ctrl_c_loses_no_token_and_leaves_the_engine_whole(llm, where, monkeypatch):
    prompts = [[1, 2, 3], [4, 5]]
    expected = [output.token_ids for output in llm.generate(prompts, GREEDY)]
    what = (llm.engine.runner, "run") if where == "network" else (llm.engine.scheduler, "launched")
    calls, call = [], getattr(*what)

    def interrupted(*given):
        calls.append(given)
        if len(calls) == (6 if where == "last step" else 3):
            signal.raise_signal(signal.SIGINT)
        return call(*given)

    made = [[], []]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*what, interrupted)
        for delta in llm.generate(prompts, GREEDY, stream=True):
            made[delta.request_id] += delta.token_ids
    count = {"network": 2, "books": 3, "last step": 6}[where]  # what was made when it came is handed out
    assert made == [tokens[:count] for tokens in expected]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert_empty_after_a_step(llm)
    assert [output.token_ids for output in llm.generate(prompts, GREEDY)] == expected


def assert_empty_after_a_step(llm):
    llm.engine.step()  # hands out what told that the answers were ended
    assert_empty(llm.engine)


def test_a_handler_of_the_callers_own_is_called_and_kept(llm, monkeypatch):
    came, launched = [], llm.engine.scheduler.launched
    monkeypatch.setattr(
        llm.engine.scheduler, "launched", lambda *given: (signal.raise_signal(signal.SIGINT), launched(*given))
    )
    before = signal.signal(signal.SIGINT, lambda *given: came.append(given))
    try:
        own = signal.getsignal(signal.SIGINT)
        assert len(llm.generate([1, 2], GREEDY)[0].token_ids) == 6
        assert signal.getsignal(signal.SIGINT) is own and len(came) == 6
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_thread_that_is_not_the_main_one_generates(llm):
    made = []
    thread = threading.Thread(target=lambda: made.extend(llm.generate([1, 2], GREEDY)))
    thread.start()
    thread.join()
    assert len(made[0].token_ids) == 6 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stream = llm.generate([1, 2], GREEDY, stream=True)
    next(stream)
    thread = threading.Thread(target=stream.close)
    thread.start()
    thread.join()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert_empty_after_a_step(llm)


def test_a_bad_prompt_is_refused_before_anything_runs(llm):
    for prompts, error in (([[1], []], UsageError), ([[1], [WORDS]], UsageError), ([[1], [2] * 300], DoesNotFit)):
        with pytest.raises(error):
            llm.generate(prompts, GREEDY, stream=True)
    assert_empty(llm.engine)


def test_chat(llm):
    answer = llm.chat(MESSAGES, max_tokens=5, temperature=0, ignore_eos=True)
    assert answer.prompt_token_ids == llm.tokenizer.apply_chat_template(MESSAGES)
    streamed = llm.chat(MESSAGES, GREEDY, stream=True, max_tokens=5)
    assert "".join(delta.text for delta in streamed) == answer.text
    with pytest.raises(UsageError, match="temprature") as caught:
        llm.chat(MESSAGES, temprature=1)
    assert "temperature" in caught.value.hint


def test_without_a_tokenizer_there_are_only_ids(llm):
    bare = LLM.from_parts(llm.engine.runner.model, llm.config, None, num_blocks=16, kv_cache="fp32")
    assert bare.generate([1, 2], GREEDY)[0].text == ""
    for call in (
        lambda: bare.generate("text"),
        lambda: bare.chat(MESSAGES),
        lambda: bare.generate([1], SamplingParams(stop="a")),
    ):
        with pytest.raises(UsageError, match="tokenizer"):
            call()


def test_the_cache_is_as_large_as_its_bytes(llm):
    config = llm.config
    for dtype in ("fp32", "bf16", "int8"):
        blocks = num_blocks_for(config, dtype, 16, budget=10**6, max_tokens=10**9)
        assert KVCache(config, blocks, 16, dtype).nbytes <= 10**6 < KVCache(config, blocks + 1, 16, dtype).nbytes
    assert num_blocks_for(config, "bf16", 16, budget=10**12, max_tokens=100) == 7
    with pytest.raises(DoesNotFit, match="One block of the KV cache takes"):
        num_blocks_for(config, "bf16", 16, budget=100, max_tokens=10**9)
    model = llm.engine.runner.model
    small = LLM.from_parts(model, config, None, kv_bytes=10**6, kv_cache="fp32", max_num_seqs=1)
    assert small.engine.scheduler.pool.num_blocks == 16  # all of one context of 256 tokens
    with pytest.raises(DoesNotFit, match="context of 256 tokens"):
        LLM.from_parts(model, config, None, num_blocks=15, max_model_len=256)


def test_the_engine_needs_no_transformers():
    code = "import sys, qwenfit.engine.llm; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
