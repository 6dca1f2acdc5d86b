"""Random arrivals, lengths, cancels and pools for an engine, and what must hold whatever they are."""

from __future__ import annotations

import os
from collections import Counter

from fakes import tokens_of
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from qwenfit.engine.engine import Engine
from qwenfit.engine.params import SamplingParams

CASES = int(os.environ.get("QWENFIT_PROPERTY_CASES", "200"))

# Prompts share beginnings, so that the prefix cache has something to find, and differ in alpha (training length 16).
BEGINNINGS = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 40, 41], [7] * 10, []]
prompts = st.builds(
    lambda start, rest: (start + rest) or [3],
    st.sampled_from(BEGINNINGS),
    st.lists(st.integers(0, 48), max_size=24),
)
KNOBS = [
    {},
    {},
    {"repetition_penalty": 1.3},
    {"frequency_penalty": 0.4, "presence_penalty": -0.7},
    {"repetition_penalty": 0.8, "frequency_penalty": 1.5},
]
arrivals = st.fixed_dictionaries(
    {
        "prompt": prompts,
        "step": st.sampled_from([0, 0, 1, 2, 5]),
        "count": st.sampled_from([1, 3, 9, 20, 20, 20]),
        "cancel": st.none() | st.none() | st.integers(0, 25),
        "salt": st.sampled_from(["", "", "tenant"]),
        "n": st.sampled_from([1, 1, 1, 2]),
        "knobs": st.sampled_from(KNOBS),
    }
)


def pools(sizes: dict) -> dict:
    """`tokens` of cache, just enough for the longest request or little more, as blocks."""
    num_blocks = -(-sizes.pop("tokens") // sizes["block_size"])
    return {**sizes, "num_blocks": num_blocks}


sizes = st.fixed_dictionaries(
    {
        "tokens": st.integers(56, 72),
        "block_size": st.sampled_from([4, 8]),
        "max_num_seqs": st.sampled_from([1, 2, 4, 4, 6]),
        "max_batched_tokens": st.sampled_from([6, 7, 11, 64]),
        "prefix_cache": st.sampled_from([True, True, False]),
        "lookahead": st.booleans(),
        "swap_blocks": st.sampled_from([0, 5, 1000, 1000]),  # none, too few, enough
    }
).map(pools)
run_settings = settings(
    max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)


def params_of(request: dict) -> SamplingParams:
    knobs = {"temperature": 0, **request["knobs"]}
    return SamplingParams(max_tokens=request["count"], n=request["n"], ignore_eos=True, **knobs)


def drive(engine: Engine, requests: list[dict], seen: Counter) -> list[tuple[dict, list]]:
    """Play the arrivals and cancels; each request with its answers' deltas."""
    ids: dict[int, int] = {}
    made: dict[tuple[int, int], list] = {}
    step = 0
    while len(ids) < len(requests) or engine.has_work:
        for i, request in enumerate(requests):
            if request["step"] == step:
                ids[i] = engine.add(request["prompt"], params_of(request), cache_salt=request["salt"])
            if request["cancel"] == step and i in ids:
                engine.abort(ids[i])
        for delta in engine.step():
            made.setdefault((delta.request_id, delta.index), []).append(delta)
        check_blocks(engine)
        step += 1
    seen["cases"] += 1
    seen["requests"] += len(requests)
    seen["steps"] += step
    seen["moved"] += engine.host is not None and engine.host.num_moved > 0
    seen["preemptions"] += engine.scheduler.num_preemptions
    return [(r, [made[ids[i], k] for k in range(r["n"])]) for i, r in enumerate(requests)]


def check_blocks(engine: Engine) -> None:
    """The pool counts exactly the blocks that requests hold, and never lends a free one; so for the host's slots."""
    pool, requests = engine.scheduler.pool, [*engine.scheduler.running, *engine.scheduler.waiting]
    held = Counter(block for request in requests for block in request.blocks)
    assert pool._references == [held[block] for block in range(pool.num_blocks)]
    assert set(pool._free) == {block for block in range(pool.num_blocks) if not held[block]}
    if engine.host is not None:
        slots = [slot for request in requests for slot in request.slots] + engine.host.memory.free
        assert sorted(slots) == list(range(engine.host.memory.size))


def check_answers(outcome: list[tuple[dict, list]], expected, seen: Counter) -> None:
    """Each answer is `expected(prompt, params, index)`, or its beginning where it was cancelled."""
    for request, answers in outcome:
        params = params_of(request)
        for index, deltas in enumerate(answers):
            tokens, last = tokens_of(deltas), deltas[-1]
            whole = expected(request["prompt"], params, index)
            assert all(delta.finish_reason is None for delta in deltas[:-1])
            assert last.stats.completion_tokens == len(tokens)
            seen[last.finish_reason] += 1
            seen["penalised and preempted"] += params.penalised and last.stats.preemptions > 0
            seen["cached"] += last.stats.cached_tokens > 0
            if last.finish_reason == "abort":
                assert tokens == whole[: len(tokens)] and len(tokens) < len(whole)
            else:
                assert last.finish_reason == "length"
                assert tokens == whole


def assert_everything_happened(seen: Counter) -> None:
    """The cases are no use if nothing is ever preempted, cached or cancelled."""
    print(dict(seen))
    cases = seen["cases"]
    assert seen["preemptions"] > cases / 10
    assert seen["penalised and preempted"] > cases / 20
    assert seen["moved"] > cases / 20
    assert seen["cached"] > cases / 10
    assert seen["abort"] > cases / 10
    assert seen["length"] > cases
