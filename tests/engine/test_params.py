"""What SamplingParams refuses."""

from __future__ import annotations

import math

import pytest

from qwenfit.engine.params import SamplingParams
from qwenfit.errors import UsageError

BAD = {
    "n": [0, -1, 10**9, 1.5, True, "2"],
    "max_tokens": [0, -1, 10**12, 2.0],
    "min_tokens": [-1, 10**12, None],
    "temperature": [-1, math.nan, math.inf, 1e9, "hot", None],
    "top_p": [0, -0.1, 2, math.nan],
    "top_k": [-2, 1.5],
    "min_p": [-0.1, 1.1, math.nan],
    "repetition_penalty": [0, -1, 1e9, math.nan],
    "presence_penalty": [1e9, -2.1, math.nan],
    "frequency_penalty": [-1e9, 2.1],
    "logit_bias": [{1: 101}, {1: math.nan}, {-1: 1}, {"1": 1}, {1.5: 1}, [1], dict.fromkeys(range(1025), 1)],
    "logprobs": [-1, 21, 1.0],
    "stop": ["", ["a", ""], "x" * 257, ["a"] * 17, [1], 5, None, "y" * 10**6],
    "stop_token_ids": [[-1], ["a"], [1.0], "12", 5, list(range(129))],
    "seed": [2**64, -(2**63) - 1, 1.5, 10**5000],
    "ignore_eos": ["yes", 1],
}


@pytest.mark.parametrize(
    "name, value", [pytest.param(name, value, id=name) for name, values in BAD.items() for value in values]
)
def test_a_value_out_of_range_is_named(name, value):
    with pytest.raises(UsageError) as caught:
        SamplingParams(**{name: value})
    assert len(caught.value.message) < 200


def test_min_tokens_above_max_tokens():
    with pytest.raises(UsageError, match="min_tokens lies between 0 and 4"):
        SamplingParams(min_tokens=5, max_tokens=4)


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"], stop_token_ids=[1]).stop == ("a", "b")


def test_the_ends_of_every_range_are_allowed():
    SamplingParams(n=128, temperature=100, top_p=1, min_p=1, logprobs=20, seed=-(2**63), top_k=2**31)
    SamplingParams(temperature=0, top_p=1e-9, presence_penalty=-2, frequency_penalty=2, logit_bias={0: -100, 5: 100})
