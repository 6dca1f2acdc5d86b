"""The engine on recorded steps that go on by themselves, as on a GPU; the network is a stand-in, the kernels are real.

The stand-in knows of a step what the graph's buffers say, so a wrong token, slot, table or alpha gives a wrong answer.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sys
from collections import Counter

import fakes
import pytest
import torch
from fakes import (
    EOS,
    FakeModel,
    FakeTokenizer,
    assert_empty,
    continue_alone,
    fake_engine,
    run_to_end,
    tiny_config,
    tokens_of,
    told,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from play import CASES, arrivals, assert_everything_happened, check_answers, drive, run_settings, sizes

from qwenfit.engine import sampler
from qwenfit.engine.engine import Engine
from qwenfit.engine.params import SamplingParams
from qwenfit.engine.runner import Runner
from qwenfit.engine.sampler import Sampler
from qwenfit.model.batch import Batch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("plays a GPU where there is none", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
from qwenfit.engine import graphs
from qwenfit.engine.graphs import DecodeGraphs
from qwenfit.kernels.triton import greedy as greedy_kernels
from qwenfit.kernels.triton.step_inputs import StepBuffers, advance_reference, extend_reference, fill_step_reference


class FakeStep:
    """`DecodeStep` of the stand-in network."""

    def __init__(self, model, cache, batch, max_blocks, device) -> None:
        self.model, self.cache = model, cache
        self.buffers = StepBuffers.padding(batch, max_blocks, device)
        self.alphas = [1.0] * batch

    def set_alphas(self, alphas) -> None:
        self.alphas[: len(alphas)] = alphas

    def run(self, out, layers=None) -> None:
        buffers, out[:] = self.buffers, torch.nan
        count = int((buffers.context_lens > 0).sum())
        assert buffers.slots.tolist()[count:] == [-1] * (len(out) - count) and int(buffers.slots[:count].min()) >= 0
        assert len({*buffers.slots.tolist()[:count]}) == count
        ids, positions, slots = (x[:count] for x in (buffers.input_ids, buffers.positions, buffers.slots))
        contexts, tables = buffers.context_lens.tolist()[:count], buffers.block_tables[:count]
        rows = torch.arange(count)
        batch = Batch(ids, positions, [1] * count, contexts, tables, slots, self.alphas[:count], rows)
        out[:count] = self.model.logits(self.model.forward(batch, self.cache, None))


class Recorded(DecodeGraphs):
    """Counts the steps whose inputs the host fills, those that it gives a block, and those that go on by themselves."""

    fills = replays = blocks = 0

    @property
    def goes_on(self) -> int:
        return self.replays - self.fills

    def _step(self, size) -> FakeStep:
        return FakeStep(self.model, self.cache, size, self.max_blocks, self.device)

    def _record(self, size, step) -> None:
        self._recorded[size] = step, self

    def run(self, *inputs):
        self.fills += 1
        return super().run(*inputs)

    def run_next(self, new=None):
        self.blocks += 0 if new is None else new.shape[1]
        return super().run_next(new)

    def replay(self) -> None:
        self.replays += 1
        self._run(self._recorded[self._size][0])


pads = False  # whether steps with prompts are padded


def recorded_engine(**options) -> Engine:
    model = options.setdefault("model", FakeModel())
    engine = fake_engine(**options)
    model.config, runner = engine.config, engine.runner
    runner._graphs = Recorded(
        model, runner.cache, len(runner._last), runner._tables.shape[1], runner.device, runner._greedy, runner._last
    )
    runner._graphs.record()
    runner.pads = pads
    return engine


@pytest.fixture(autouse=True, params=["at once, padded", "lookahead", "lookahead, padded"])
def lookahead(request, monkeypatch):
    monkeypatch.setattr(fakes, "lookahead", "lookahead" in request.param)
    monkeypatch.setitem(globals(), "pads", "padded" in request.param)
    monkeypatch.setattr(sampler, "to_host", torch.clone)  # as a GPU does: a copy of what is there now
    return fakes.lookahead


def greedy(count: int = 8, **changes) -> SamplingParams:
    return SamplingParams(**{"max_tokens": count, "temperature": 0, "ignore_eos": True, **changes})


def by_answer(deltas: list) -> dict[tuple[int, int], list]:
    made: dict[tuple[int, int], list] = {}
    for delta in deltas:
        made.setdefault((delta.request_id, delta.index), []).append(delta)
    return made


def check_alone(engine, made, ids, prompts, counts) -> None:
    for request_id, prompt, count in zip(ids, prompts, counts, strict=True):
        assert tokens_of(made[request_id, 0]) == continue_alone(engine.runner.model, engine.config, prompt, count)
    assert_empty(engine)


@pytest.mark.parametrize("count", [1, 2, 13, 14])
def test_the_host_brings_only_new_blocks(count):
    """A prompt of 3 in blocks of 4: the tokens 4, 8, 12, ... are the first of theirs."""
    engine = recorded_engine()
    request_id = engine.add([1, 2, 3], greedy(count))
    check_alone(engine, run_to_end(engine), [request_id], [[1, 2, 3]], [count])
    recorded = engine.runner._graphs
    steps = [3 + i for i in range(count - 1)]  # tokens computed before each
    assert recorded.fills == min(len(steps), 1) and recorded.goes_on == len(steps) - recorded.fills
    assert recorded.blocks == sum(at % 4 == 0 for at in steps)


def test_requests_join_and_leave():
    engine = recorded_engine(block_size=8, config=tiny_config())
    prompts = [[1, 2, 3], list(range(20)), [5] * 33, [9, 8, 7, 6], [4]]
    counts = [30, 9, 20, 3, 11]
    ids, made = [], []
    for prompt, count in zip(prompts, counts, strict=True):
        ids.append(engine.add(prompt, greedy(count)))
        made += [delta for _ in range(4) for delta in engine.step()]
    while engine.has_work:
        made += engine.step()
    check_alone(engine, by_answer(made), ids, prompts, counts)
    assert engine.runner._graphs.goes_on > 10


def test_an_aborted_request_leaves_the_others_alone():
    engine = recorded_engine(block_size=16)
    prompts = [[1, 2, 3], [4, 5], [6]]
    ids = [engine.add(prompt, greedy(12)) for prompt in prompts]
    made = [delta for _ in range(5) for delta in engine.step()]
    engine.abort(ids[1])
    while engine.has_work:
        made += engine.step()
    made = by_answer(made)
    assert made[ids[1], 0][-1].finish_reason == "abort"
    check_alone(engine, made, [ids[0], ids[2]], [prompts[0], prompts[2]], [12, 12])
    assert engine.runner._graphs.goes_on > 5


def test_a_preempted_request_comes_back():
    """With its old row or another, and with its blocks found in the prefix cache, all but the last token."""
    for prefix_cache in (False, True):
        engine = recorded_engine(num_blocks=10, prefix_cache=prefix_cache)
        prompts = [[1] * 12, [2] * 12, [3] * 4]
        ids = [engine.add(prompt, greedy(20)) for prompt in prompts]
        check_alone(engine, run_to_end(engine), ids, prompts, [20] * 3)
        assert engine.scheduler.num_preemptions > 0 and engine.runner._graphs.goes_on > 5


def test_the_last_token_of_the_longest_context():
    """It ends with a block, and with the table, which has no room for the one after."""
    engine = recorded_engine(num_blocks=16, block_size=4)
    assert engine.max_model_len == 64 == engine.runner._tables.shape[1] * 4
    prompts = [list(range(50)), [1, 2, 3]]
    ids = [engine.add(prompts[0], greedy(100))]
    check_alone(engine, run_to_end(engine), ids, prompts[:1], [14])
    ids = [engine.add(prompts[1], greedy(100))]
    check_alone(engine, run_to_end(engine), ids, prompts[1:], [61])


def test_every_kind_of_request_is_answered_as_without_a_graph():
    words = FakeTokenizer().words
    wanted = [
        greedy(9),
        greedy(30, ignore_eos=False, stop=[words[3] + words[5], words[7]], min_tokens=3),
        greedy(16, logprobs=2),
        SamplingParams(max_tokens=12, seed=4, temperature=1.3, logprobs=2),
        SamplingParams(max_tokens=14, seed=5, top_p=0.8, top_k=9, min_p=0.01, min_tokens=5),
        greedy(11, repetition_penalty=1.3, frequency_penalty=0.4, n=2),
        greedy(20, n=2),
        greedy(10, presence_penalty=1.5, logit_bias={4: 3.0}, logprobs=1),
        greedy(16, stop_token_ids=list(range(0, 40, 5)), n=2),
        greedy(12, min_tokens=6, ignore_eos=False, logprobs=0),
    ]
    outcomes = []
    for make in (fake_engine, recorded_engine):
        for together in (True, False):  # alone, the greedy ones go on by themselves
            engine = make(num_blocks=24, max_num_seqs=4, max_batched_tokens=9)
            ids, made = [], {}
            for i, params in enumerate(wanted):
                ids.append(engine.add([i, 2, 3, i, 5, 6, 7], params))
                made |= {} if together else run_to_end(engine)
            made |= run_to_end(engine)
            assert_empty(engine)
            outcomes.append(told(made, ids, wanted))
    assert outcomes[0] == outcomes[2] and outcomes[1] == outcomes[3]
    assert engine.runner._graphs.goes_on > 20


def test_a_choice_of_the_sampler_is_what_the_graph_goes_on_with(lookahead):
    """Where it is kept on the device; else the host brings it."""
    engine = recorded_engine(block_size=64)
    request_id = engine.add([1, 2], greedy(20, min_tokens=8, ignore_eos=False))
    made = run_to_end(engine)
    assert len(tokens_of(made[request_id, 0])) >= 8 and EOS not in tokens_of(made[request_id, 0])[:8]
    assert engine.runner._graphs.fills == (1 if lookahead else 8) and engine.runner._graphs.goes_on > 0
    for params in (
        greedy(9, logit_bias={3: 1.0}),
        greedy(9, presence_penalty=0.1),
        greedy(9, temperature=1.0, seed=1),
    ):
        engine = recorded_engine(block_size=64)
        wanted = tokens_of(run_to_end_of(fake_engine(block_size=64), [1, 2], params))
        assert tokens_of(run_to_end_of(engine, [1, 2], params)) == wanted
        assert (engine.runner._graphs.fills, engine.runner._graphs.goes_on) == ((1, 7) if lookahead else (8, 0))


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("at", [3, 4, 6, 10])
def test_interrupted_again_and_again_no_token_is_lost(at, times):
    engine = recorded_engine(block_size=4)
    prompts = [[1, 2, 3], [4, 5]]
    ids = [engine.add(prompt, greedy(9)) for prompt in prompts]
    deltas = [delta for _ in range(at) for delta in engine.step()]
    for _ in range(times):
        engine.runner.model.fail_with = KeyboardInterrupt()
        with contextlib.suppress(KeyboardInterrupt):
            deltas += engine.step()
        engine.runner.model.fail_with = None
    while engine.has_work:
        deltas += engine.step()
    made = by_answer(deltas)
    check_alone(engine, made, ids, prompts, [9, 9])
    assert all(made[request_id, 0][-1].finish_reason == "length" for request_id in ids)


def test_ids_without_a_text_are_never_chosen():
    free = tokens_of(run_to_end_of(recorded_engine(), [1, 2], greedy(20)))
    tokenizer = FakeTokenizer()
    tokenizer.textless_ids = tuple(free[:5])
    made = [
        [(delta.token_ids, delta.logprobs) for delta in run_to_end_of(engine, [1, 2], greedy(20, logprobs=3))]
        for engine in (fake_engine(tokenizer=tokenizer), recorded_engine(tokenizer=tokenizer))
    ]
    assert made[0] == made[1] and not {token for tokens, _ in made[1] for token in tokens} & set(free[:5])


def run_to_end_of(engine, prompt, params) -> list:
    request_id = engine.add(prompt, params)
    return run_to_end(engine)[request_id, 0]


def test_logits_that_are_not_finite_end_only_their_own_request():
    model, config = FakeModel(), tiny_config()
    prompts = [[1, 2, 3], [1, 2, 4, 4]]
    answers = [continue_alone(model, config, prompt, 12) for prompt in prompts]
    at = next(
        i for i, token in enumerate(answers[1]) if i > 2 and token not in answers[0] + answers[1][:i] + [1, 2, 3, 4]
    )
    model.poison = answers[1][at]
    engine = recorded_engine(model=model, config=config, block_size=32)
    good, bad = [engine.add(prompt, greedy(12)) for prompt in prompts]
    made = run_to_end(engine)
    assert tokens_of(made[bad, 0]) == answers[1][: at + 1] and made[bad, 0][-1].finish_reason == "error"
    assert tokens_of(made[good, 0]) == answers[0]
    assert engine.runner._graphs.goes_on > 6
    assert_empty(engine)


@pytest.mark.parametrize("what", [(FakeModel, "forward"), (Sampler, "choose"), (sampler, "Chosen"), (Runner, "keep")])
@pytest.mark.parametrize("at", [4, 5])
@pytest.mark.parametrize("bias", [{}, {3: 0.0}], ids=["goes on", "adjusted"])
def test_an_interrupted_step_is_taken_again(what, at, bias, monkeypatch):
    """Though the graph has kept its tokens already, in place of those that the step starts from."""
    engine = recorded_engine(block_size=4)
    prompts = [[1, 2, 3], [4, 5]]
    ids = [engine.add(prompt, greedy(9, logit_bias=bias)) for prompt in prompts]
    made = [delta for _ in range(at) for delta in engine.step()]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*what, stop)
        made += engine.step()
        raise KeyboardInterrupt  # where there was nothing to keep
    while engine.has_work:
        made += engine.step()
    check_alone(engine, by_answer(made), ids, prompts, [9, 9])


def test_an_interrupted_read_goes_on_where_it_was(monkeypatch):
    """Twice in a row: what had been read keeps its order."""
    engine = recorded_engine(block_size=4)
    ids = [engine.add(prompt, greedy(9)) for prompt in ([1, 2, 3], [4, 5])]
    made = [delta for _ in range(4) for delta in engine.step()]
    for what, stops in ((sampler.Chosen, "read"), (engine.runner, "run")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(what, stops, stopped)
            made += engine.step()
    while engine.has_work:
        made += engine.step()
    check_alone(engine, by_answer(made), ids, [[1, 2, 3], [4, 5]], [9, 9])


def stopped(*_):
    raise KeyboardInterrupt


def interrupted_at(call: int, prompts: list[list[int]]) -> tuple[Engine, list[int], list, int]:
    """An engine to whose `call`th call of its own code Ctrl-C came; the answers' ids, the deltas, and its calls."""
    engine = recorded_engine(block_size=4)
    ids = [engine.add(prompt, greedy(9)) for prompt in prompts]
    made, calls = [], 0

    def profile(frame, event, _):
        nonlocal calls
        if event == "call" and "/qwenfit/engine/" in frame.f_code.co_filename:
            calls += 1
            if calls == call:
                signal.raise_signal(signal.SIGINT)

    with contextlib.suppress(KeyboardInterrupt), engine.interrupts.taken():
        for _ in range(100):
            sys.setprofile(profile)
            with contextlib.suppress(KeyboardInterrupt):
                made += engine.step()
            sys.setprofile(None)
    return engine, ids, made, calls


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a generator that was interrupted
def test_ctrl_c_may_come_at_any_call(monkeypatch):
    use_references(monkeypatch)
    prompts, stride = [[1, 2, 3], [4, 5], [6] * 9], 7
    *_, calls = interrupted_at(0, prompts)
    assert calls > 500
    for call in range(1 + random.randrange(stride), calls, stride):
        engine, ids, made, _ = interrupted_at(call, prompts)
        check_alone(engine, by_answer(made), ids, prompts, [9] * 3)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_out_of_memory_ends_the_step_and_not_the_engine():
    engine = recorded_engine()
    bad = engine.add([1, 2, 3], greedy(20))
    for _ in range(6):
        engine.step()
    engine.runner.model.fail_with = torch.OutOfMemoryError("CUDA out of memory.")
    last = run_to_end(engine)[bad, 0][-1]
    assert (last.finish_reason, last.error) == ("error", "The device ran out of memory.")
    good = engine.add([1, 2, 3], greedy(8))
    check_alone(engine, run_to_end(engine), [good], [[1, 2, 3]], [8])


SEEN: Counter[str] = Counter()


@settings(run_settings, max_examples=max(CASES // 4, 10))
@given(sizes, st.lists(arrivals, min_size=2, max_size=8))
def test_every_answer_is_the_one_given_alone(options, requests):
    with pytest.MonkeyPatch.context() as patch:
        use_references(patch)
        engine = recorded_engine(**options)

        def expected(prompt, params, _):
            return continue_alone(engine.runner.model, engine.config, prompt, params.max_tokens, params)

        check_answers(drive(engine, requests, SEEN), expected, SEEN)
    SEEN["goes on"] += engine.runner._graphs.goes_on
    SEEN["new blocks"] += engine.runner._graphs.blocks
    assert_empty(engine)


def use_references(patch: pytest.MonkeyPatch) -> None:
    """In place of the kernels: they are a hundred times as fast here."""
    patch.setattr(graphs, "fill_step", fill_step_reference)
    patch.setattr(graphs, "advance", advance_reference)
    patch.setattr(graphs, "extend", extend_reference)
    patch.setattr(greedy_kernels, "greedy", plain_greedy)


def plain_greedy(logits, vocab_size, banned, out):
    return out.copy_(greedy_kernels.greedy_reference(logits, vocab_size, banned))


def test_everything_happened():
    assert_everything_happened(SEEN)
    assert SEEN["goes on"] > SEEN["steps"] / 20
    assert SEEN["new blocks"] > SEEN["steps"] / 20
