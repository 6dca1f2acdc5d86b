"""Whatever arrives, leaves, is cut, cached or preempted: every answer is the one its prompt gets alone."""

from __future__ import annotations

from collections import Counter

from fakes import FakeModel, assert_empty, continue_alone, fake_engine, run_to_end, tiny_config, tokens_of
from hypothesis import given, settings
from hypothesis import strategies as st
from play import CASES, arrivals, assert_everything_happened, check_answers, drive, run_settings, sizes

SEEN: Counter[str] = Counter()
DRAWS: Counter[str] = Counter()


@run_settings
@given(sizes, st.lists(arrivals, min_size=2, max_size=10))
def test_every_answer_is_the_one_given_alone(options, requests):
    model, config = FakeModel(), tiny_config()
    engine = fake_engine(model=model, config=config, **options)

    def expected(prompt, params, _):
        return continue_alone(model, config, prompt, params.max_tokens, params)

    check_answers(drive(engine, requests, SEEN), expected, SEEN)
    assert max(model.token_counts, default=0) <= options["max_batched_tokens"]
    assert_empty(engine)


DRAWN = {"temperature": 1.5, "seed": 3}
ALONE: dict[tuple, list[int]] = {}


def drawn_alone(prompt, params, index):
    """By an engine that has nothing else to do, reads each step at once and never runs out of blocks."""
    key = (*prompt, str(params), index)
    if key not in ALONE:
        engine = fake_engine(lookahead=False)
        request_id = engine.add(prompt, params)
        made = run_to_end(engine)
        ALONE.update({(*prompt, str(params), k): tokens_of(made[request_id, k]) for k in range(params.n)})
    return ALONE[key]


@settings(run_settings, max_examples=max(CASES // 4, 10))
@given(sizes, st.lists(arrivals, min_size=2, max_size=6))
def test_every_draw_is_the_one_drawn_alone(options, requests):
    """With seeds, penalties and n > 1; whether tokens are read at once or a step late."""
    requests = [{**request, "knobs": {**DRAWN, **request["knobs"]}} for request in requests]
    engine = fake_engine(**options)
    check_answers(drive(engine, requests, DRAWS), drawn_alone, DRAWS)
    assert_empty(engine)


def test_everything_happened():
    assert_everything_happened(SEEN)
    assert_everything_happened(DRAWS)
