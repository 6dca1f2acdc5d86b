"""Whatever arrives, leaves, is cut, cached or preempted: every answer is the one its prompt gets alone."""

from __future__ import annotations

from collections import Counter

from fakes import FakeModel, assert_empty, continue_alone, fake_engine, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from play import arrivals, assert_everything_happened, check_answers, drive, run_settings, sizes

SEEN: Counter[str] = Counter()


@run_settings
@given(sizes, st.lists(arrivals, min_size=2, max_size=10))
def test_every_answer_is_the_one_given_alone(options, requests):
    model, config = FakeModel(), tiny_config()
    engine = fake_engine(model=model, config=config, **options)
    check_answers(
        drive(engine, requests, SEEN), lambda prompt, count: continue_alone(model, config, prompt, count), SEEN
    )
    assert max(model.token_counts, default=0) <= options["max_batched_tokens"]
    assert_empty(engine)


def test_everything_happened():
    assert_everything_happened(SEEN)
