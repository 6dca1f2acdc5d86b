"""How requests join, wait, share, are cut short, refused, and end."""

from __future__ import annotations

import gc
import tracemalloc

import fakes
import pytest
import torch
from fakes import (
    EOS,
    WORDS,
    FakeModel,
    FakeTokenizer,
    assert_empty,
    continue_alone,
    fake_engine,
    run_to_end,
    text_of,
    tiny_config,
    tokens_of,
    told,
)

from qwenfit.engine.engine import QueueFull
from qwenfit.engine.params import SamplingParams
from qwenfit.engine.sampler import Chosen
from qwenfit.errors import DoesNotFit, UsageError


@pytest.fixture(autouse=True, params=[False, True], ids=["at once", "lookahead"])
def lookahead(request, monkeypatch):
    monkeypatch.setattr(fakes, "lookahead", request.param)
    return request.param


def greedy(count: int = 8, **changes) -> SamplingParams:
    return SamplingParams(**{"max_tokens": count, "temperature": 0, "ignore_eos": True, **changes})


def answer(engine, prompt, params, **options) -> list:
    request_id = engine.add(prompt, params, **options)
    return run_to_end(engine)[request_id, 0]


def test_decoding_goes_on_while_a_long_prompt_is_read(lookahead):
    engine = fake_engine(max_batched_tokens=8)
    first = engine.add([1, 2, 3], greedy(20))
    for _ in range(1 + lookahead):
        engine.step()
    second = engine.add(list(range(40)), greedy(3))
    if lookahead:
        engine.step()  # the token of the step before; the prompt's first part is under way
    steps = []
    while len(steps) < 6:
        steps.append([d.request_id for d in engine.step()])
    assert all(first in step for step in steps)
    assert [second in step for step in steps] == [False] * 5 + [True]  # 40 tokens, 7 a step
    assert max(engine.runner.model.token_counts) == 8


def test_a_second_turn_computes_only_what_is_new():
    engine = fake_engine()
    prompt = [5, 6, 7, 8, 9, 10, 11]
    made = tokens_of(answer(engine, prompt, greedy(6)))
    follow_up = [*prompt, *made, 1, 2]
    engine.runner.model.token_counts.clear()
    deltas = answer(engine, follow_up, greedy(1))
    # 12 tokens of the first turn had been computed (the last answer token never is): 3 full blocks of 4.
    assert deltas[-1].stats.cached_tokens == 12
    assert engine.runner.model.token_counts == [len(follow_up) - 12]


def test_a_whole_cached_prompt_still_computes_its_last_token():
    engine = fake_engine()
    prompt = list(range(8))
    first = tokens_of(answer(engine, prompt, greedy()))
    deltas = answer(engine, prompt, greedy())
    assert deltas[-1].stats.cached_tokens == 4 and tokens_of(deltas) == first


def test_prefixes_are_not_shared_across_alpha_or_salt():
    engine = fake_engine()  # training length 16
    start = list(range(12))
    answer(engine, start, greedy(1))
    assert answer(engine, [*start, 1], greedy(1))[-1].stats.cached_tokens == 12
    assert answer(engine, [*start, 1], greedy(1), cache_salt="a")[-1].stats.cached_tokens == 0
    assert answer(engine, [*start, *start], greedy(1))[-1].stats.cached_tokens == 0  # alpha 3
    assert answer(engine, [*start, *start, 2], greedy(1))[-1].stats.cached_tokens == 24
    assert answer(engine, [*start, *start, *start], greedy(1))[-1].stats.cached_tokens == 0  # alpha 7


def test_alpha_stays_what_the_prompt_made_it_when_recomputed():
    model, config = FakeModel(), tiny_config()
    engine = fake_engine(num_blocks=10, model=model, prefix_cache=False)
    prompts = [[1] * 12, [2] * 12]  # alpha 1; with their answers 32 tokens, whose alpha would be 3
    ids = [engine.add(prompt, greedy(20)) for prompt in prompts]
    made = run_to_end(engine)
    assert engine.scheduler.num_preemptions > 0
    for request_id, prompt in zip(ids, prompts, strict=True):
        assert tokens_of(made[request_id, 0]) == continue_alone(model, config, prompt, 20)
    assert made[ids[1], 0][-1].stats.preemptions > 0


def test_a_preempted_sample_goes_on_with_the_same_draws():
    params = SamplingParams(max_tokens=20, seed=3, ignore_eos=True, top_p=0.9, presence_penalty=0.5)
    prompts = [[1] * 12, [2] * 12]
    alone = [tokens_of(answer(fake_engine(), prompt, params)) for prompt in prompts]
    engine = fake_engine(num_blocks=10)
    ids = [engine.add(prompt, params) for prompt in prompts]
    made = run_to_end(engine)
    assert engine.scheduler.num_preemptions > 0
    assert [tokens_of(made[request_id, 0]) for request_id in ids] == alone


def test_n_answers_read_the_prompt_once(lookahead):
    engine = fake_engine()
    prompt = list(range(12))
    request_id = engine.add(prompt, SamplingParams(n=5, max_tokens=4, seed=1, ignore_eos=True))
    made = run_to_end(engine)
    assert sorted(made) == [(request_id, i) for i in range(5)]
    answers = [tuple(tokens_of(made[request_id, i])) for i in range(5)]
    assert len(set(answers)) > 1 and all(len(a) == 4 for a in answers)
    # The others find two blocks of four, and compute the third; with lookahead they start when the first has a token.
    assert engine.runner.model.token_counts[:3] == ([12, 1, 1 + 4 * 4] if lookahead else [12, 1 + 4 * 4, 5])
    assert_empty(engine)
    again = engine.add(prompt, SamplingParams(n=5, max_tokens=4, seed=1, ignore_eos=True))
    made = run_to_end(engine)
    assert [tuple(tokens_of(made[again, i])) for i in range(5)] == answers


@pytest.mark.parametrize("when", [0, 1, 4])
def test_abort_ends_all_n_answers(when):
    engine = fake_engine()
    other = engine.add([1, 2], greedy(9))
    request_id = engine.add(list(range(40)), greedy(30, n=3))
    made: dict = {}
    for step in range(100):
        if step == when:
            engine.abort(request_id, 12345)
        for delta in engine.step():
            made.setdefault((delta.request_id, delta.index), []).append(delta)
        if not engine.has_work:
            break
    assert [made[request_id, i][-1].finish_reason for i in range(3)] == ["abort"] * 3
    assert len(tokens_of(made[other, 0])) == 9
    assert_empty(engine)


def test_answers_do_not_depend_on_when_tokens_are_read(monkeypatch):
    words = FakeTokenizer().words
    wanted = [
        greedy(9),
        greedy(30, ignore_eos=False, stop=[words[3] + words[5], words[7]], min_tokens=3),
        SamplingParams(max_tokens=12, seed=4, temperature=1.3, logprobs=2),
        SamplingParams(max_tokens=14, seed=5, top_p=0.8, top_k=9, min_p=0.01, min_tokens=5),
        SamplingParams(max_tokens=11, seed=6, repetition_penalty=1.3, frequency_penalty=0.4, n=2),
        greedy(10, presence_penalty=1.5, logit_bias={4: 3.0}, logprobs=1),
        SamplingParams(max_tokens=16, seed=7, stop_token_ids=list(range(0, 40, 3)), n=3),
    ]
    outcomes = []
    for ahead in (False, True):
        monkeypatch.setattr(fakes, "lookahead", ahead)
        engine = fake_engine(num_blocks=24, max_num_seqs=4, max_batched_tokens=9)
        ids = [engine.add([i, 2, 3, i, 5, 6, 7], params) for i, params in enumerate(wanted)]
        made = run_to_end(engine)
        assert_empty(engine)
        outcomes.append(told(made, ids, wanted))
    assert outcomes[0] == outcomes[1]


PENALTIES = [{}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.1, "frequency_penalty": 0.2}]


@pytest.mark.parametrize("penalties", PENALTIES)
def test_the_host_reads_a_step_while_the_next_one_is_under_way(lookahead, penalties, monkeypatch):
    engine = fake_engine()
    events = []
    forward, read = FakeModel.forward, Chosen.read
    monkeypatch.setattr(FakeModel, "forward", lambda *args: events.append("launch") or forward(*args))
    monkeypatch.setattr(Chosen, "read", lambda chosen: events.append("read") or read(chosen))
    engine.add([1, 2, 3], greedy(5, **penalties))
    assert len(engine.step()) == (0 if lookahead else 1)
    run_to_end(engine)
    # Five each: the length is known beforehand, and nothing is computed beyond it.
    assert events == (["launch", *["launch", "read"] * 4, "read"] if lookahead else ["launch", "read"] * 5)
    assert_empty(engine)


def test_a_deadline_ends_a_request_wherever_it_is():
    now = [100.0]
    engine = fake_engine(max_num_seqs=1, clock=lambda: now[0])
    running = engine.add([1, 2, 3], greedy(50), deadline=5.0)
    waiting = engine.add([4, 5], greedy(50, n=2), deadline=3.0)
    patient = engine.add([6, 7], greedy(5))
    engine.step()
    now[0] = 104.0
    ended = {(d.request_id, d.index): d.finish_reason for d in engine.step()}
    assert ended == {(running, 0): None, (waiting, 0): "deadline", (waiting, 1): "deadline"}
    now[0] = 105.0
    made = run_to_end(engine)
    assert made[running, 0][-1].finish_reason == "deadline"
    assert made[patient, 0][-1].finish_reason == "length"
    assert_empty(engine)


def test_what_cannot_fit_is_refused_at_once():
    engine = fake_engine(num_blocks=5)  # 20 tokens
    assert engine.max_model_len == 20
    with pytest.raises(DoesNotFit, match="The prompt has 20 tokens"):
        engine.add([1] * 20, greedy())
    assert len(tokens_of(answer(engine, [1] * 19, greedy(50)))) == 1
    assert len(tokens_of(answer(engine, [1] * 10, greedy(50)))) == 10
    assert_empty(engine)


@pytest.mark.parametrize(
    "prompt, params",
    [
        ([], {}),
        ([WORDS], {}),
        ([-1], {}),
        (["a"], {}),
        ([True], {}),
        ([1], {"logit_bias": {WORDS: 1.0}}),
        ([1], {"stop_token_ids": [WORDS]}),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(prompt, params):
    engine = fake_engine()
    with pytest.raises(UsageError):
        engine.add(prompt, greedy(**params))
    assert_empty(engine)


def test_the_queue_has_an_end():
    engine = fake_engine(max_queue=2, max_num_seqs=1)
    for _ in range(2):
        engine.add([1], greedy(3))
    with pytest.raises(QueueFull):
        engine.add([1], greedy(3))
    engine.step()
    engine.add([1], greedy(3))
    assert len(run_to_end(engine)) == 3


@pytest.mark.parametrize("penalties", PENALTIES)
def test_logits_that_are_not_finite_end_only_their_own_request(penalties):
    model, config = FakeModel(poison=13), tiny_config()
    engine = fake_engine(model=model, config=config)
    good = engine.add([1, 2, 3], greedy(10, logit_bias={13: -100}, **penalties))
    bad = engine.add([1, 2, 13, 4, 5, 6, 7, 8, 9], greedy(10, n=2, **penalties))
    made = run_to_end(engine)
    for index in range(2):
        (last,) = made[bad, index]
        assert last.finish_reason == "error" and "not finite" in last.error and last.token_ids == []
    assert made[good, 0][-1].finish_reason == "length" and len(tokens_of(made[good, 0])) == 10
    # Nothing of the bad prompt is offered to others.
    assert answer(engine, [1, 2, 13, 4, 5], greedy(1))[-1].stats.cached_tokens == 0
    assert_empty(engine)


def test_out_of_memory_ends_the_step_and_not_the_engine():
    engine = fake_engine()
    bad = engine.add([1, 2, 3], greedy())
    engine.runner.model.fail_with = torch.OutOfMemoryError("CUDA out of memory. Tried 7 GiB at /home/me")
    (last,) = engine.step()
    assert (last.request_id, last.finish_reason, last.error) == (bad, "error", "The device ran out of memory.")
    assert len(tokens_of(answer(engine, [1, 2, 3], greedy()))) == 8
    assert_empty(engine)


@pytest.mark.parametrize("at", [0, 1, 5])
def test_an_interrupted_step_can_be_taken_again(at):
    model, config = FakeModel(), tiny_config()
    engine = fake_engine(model=model, max_batched_tokens=8)
    prompt = list(range(20))
    request_id = engine.add(prompt, greedy(8))
    made = []
    for step in range(11):
        if step == at:
            model.fail_with = KeyboardInterrupt()
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        made += engine.step()
    assert not engine.has_work and {d.request_id for d in made} == {request_id}
    assert tokens_of(made) == continue_alone(model, config, prompt, 8)


def test_a_step_interrupted_after_its_choice_chooses_the_same_again(monkeypatch):
    """Nor does what it chose the first time count as said, beside an answer that is longer."""
    outcomes = []
    for interrupted in (False, True):
        engine = fake_engine()
        for prompt in (list(range(20)), [1, 2]):
            engine.add(prompt, greedy(8, frequency_penalty=2.0, repetition_penalty=2.0))
        made = engine.step() + engine.step()
        if interrupted:
            choose = engine.sampler.choose

            def choose_and_stop(*args, choose=choose):
                choose(*args)
                raise KeyboardInterrupt

            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(engine.sampler, "choose", choose_and_stop)
                engine.step()
        while engine.has_work:
            made += engine.step()
        outcomes.append([(d.request_id, d.token_ids) for d in made])
    assert outcomes[0] == outcomes[1]


def test_end_of_sequence_and_stop_tokens():
    engine = fake_engine()
    for params in ({"logit_bias": {EOS: 100}}, {"logit_bias": {7: 100}, "stop_token_ids": [7]}):
        last = answer(engine, [1, 2], SamplingParams(temperature=0, **params))[-1]
        assert last.finish_reason == "stop" and last.token_ids == [last.stop_reason] and last.text == ""
        assert last.stats.completion_tokens == 1
    ignored = answer(engine, [1, 2], greedy(5, logit_bias={EOS: 100}))
    assert tokens_of(ignored) == [EOS] * 5 and ignored[-1].finish_reason == "length"
    late = tokens_of(answer(engine, [1, 2], greedy(9, ignore_eos=False, min_tokens=4, logit_bias={EOS: 100})))
    assert len(late) == 5 and EOS not in late[:4] and late[4] == EOS


def test_ids_without_a_text_are_never_drawn():
    free = tokens_of(answer(fake_engine(), [1, 2], greedy(20)))
    tokenizer = FakeTokenizer()
    tokenizer.textless_ids = tuple(free[:5])
    assert not set(tokens_of(answer(fake_engine(tokenizer=tokenizer), [1, 2], greedy(20)))) & set(free[:5])


def test_stop_strings_end_the_text_before_them():
    words = FakeTokenizer().words
    engine = fake_engine()
    tokens = tokens_of(answer(engine, [3, 1], greedy(30)))
    whole = "".join(words[t] for t in tokens)
    for length in (1, 2, 3, 5):
        for at in range(0, len(whole) - length, 3):
            stop = whole[at : at + length]
            deltas = answer(engine, [3, 1], greedy(30, stop=["#", stop]))
            assert text_of(deltas) == whole[: whole.index(stop)]
            assert deltas[-1].finish_reason == "stop" and deltas[-1].stop_reason == stop
            assert tokens_of(deltas) == tokens[: deltas[-1].stats.completion_tokens]
    spared = answer(engine, [3, 1], greedy(30, stop=words[tokens[0]], min_tokens=2))
    assert text_of(spared).startswith(words[tokens[0]])


def test_text_held_back_for_a_stop_string_comes_at_the_end():
    engine = fake_engine()
    words = FakeTokenizer().words
    tokens = tokens_of(answer(engine, [3, 1], greedy(6)))
    whole = "".join(words[t] for t in tokens)
    deltas = answer(engine, [3, 1], greedy(6, stop=whole + "#"))
    assert all(delta.text == "" for delta in deltas[:-1])
    assert text_of(deltas) == whole and deltas[-1].finish_reason == "length"


def test_stats():
    now = [0.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    engine = fake_engine(clock=clock)
    stats = answer(engine, [1, 2, 3], greedy(4))[-1].stats
    assert (stats.prompt_tokens, stats.completion_tokens, stats.preemptions) == (3, 4, 0)
    assert 0 < stats.queue_time < stats.time_to_first_token
    assert stats.decode_tokens_per_s == pytest.approx(3 / (stats.finished - stats.first_token))


def test_memory_after_a_thousand_requests_is_that_after_ten():
    engine = fake_engine(num_blocks=16, max_batched_tokens=16)

    def serve(count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for i in range(count):
            length = int(torch.randint(1, 30, (1,), generator=generator))
            prompt = torch.randint(0, WORDS, (length,), generator=generator)
            penalties = PENALTIES[i % 3]
            params = SamplingParams(max_tokens=6, n=1 + i % 2, stop="abc", logprobs=i % 3, **penalties)
            request_id = engine.add(prompt.tolist(), params, deadline=1000.0, cache_salt=str(i))
            if i % 7 == 0:
                engine.step()
                engine.abort(request_id)
            if i % 4 == 3:
                run_to_end(engine)
        run_to_end(engine)
        answer(engine, [1, 2, 3], greedy(2))  # the sampler keeps the requests of the last step: let them be these
        engine.runner.model.token_counts.clear()
        assert_empty(engine)
        gc.collect()

    def tensors() -> int:
        return sum(o.untyped_storage().nbytes() for o in gc.get_objects() if type(o) is torch.Tensor)

    serve(60, seed=0)  # fills the prefix cache
    tracemalloc.start()
    serve(10, seed=1)
    in_tensors = tensors()
    after_ten, objects = tracemalloc.get_traced_memory()[0], len(gc.get_objects())
    serve(990, seed=2)
    grown, more = tracemalloc.get_traced_memory()[0] - after_ten, len(gc.get_objects()) - objects
    tracemalloc.stop()
    print(f"after 1000 requests, more than after 10: {grown} bytes, {more} objects")
    assert in_tensors > 0 and abs(tensors() - in_tensors) < 1000  # the numbers of the last step, whatever its size
    # Interned floats and free lists settle at some 60 kB; a kilobyte a request, and it would be a megabyte.
    assert grown < 100_000
    assert more < 20
