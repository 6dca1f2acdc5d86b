"""Sampling: every knob against transformers' own processors, draws against the exact distribution."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwenfit.engine.output import Stats
from qwenfit.engine.params import SamplingParams
from qwenfit.engine.request import Request
from qwenfit.engine.sampler import Sampler, draw, draw_filtered, draw_sorted, row_max, uniform

VOCAB = 40
PROMPT, ANSWER = [3, 5, 5, 9, 11], [2, 5, 2, 2]


def request(params: SamplingParams, prompt=PROMPT, answer=ANSWER, row=0, seed=1, stop_ids=()) -> Request:
    return Request(
        id=1,
        index=0,
        tokens=[*prompt, *answer],
        prompt_length=len(prompt),
        max_length=1000,
        params=params,
        seed=seed if params.seed is None else params.seed,
        alpha=1.0,
        stop_ids=frozenset(stop_ids),
        prefix_root=b"",
        text=None,
        stats=Stats(len(prompt), 0.0),
        row=row,
    )


def sampler(vocab=VOCAB, banned=()) -> Sampler:
    return Sampler(vocab, 8, 64, torch.device("cpu"), banned)


def adjusted(logits: torch.Tensor, *requests: Request) -> torch.Tensor:
    out = logits.clone()
    sampler(logits.shape[1])._adjust(out, list(requests))
    return out


def distribution(
    logits: torch.Tensor, params: SamplingParams, points: int = 2003, with_filter=draw_filtered
) -> torch.Tensor:
    """What the sampler draws at `points` evenly spaced uniforms: the whole distribution, to 1/points."""
    scaled = ((logits - logits.max()) / params.temperature).expand(points, -1)
    u = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    if params.top_k or params.top_p < 1 or params.min_p:
        knobs = (torch.full((points,), float(v)) for v in (params.top_k, params.top_p, params.min_p))
        drawn = with_filter(scaled, u, *knobs)
    else:
        drawn = draw(scaled, u)
    return torch.bincount(drawn, minlength=len(logits)) / points


def transformers_distribution(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    steps = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    return steps(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())[0].softmax(-1)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.sampled_from([40, 128, 300, 1000]),
    st.integers(0, 10**6),
    st.floats(0.2, 3.0),
    st.sampled_from([0, 0, 1, 2, 7, 39, 200, 1000]),
    st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 0.1, 1e-4]),
    st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
)
def test_filters_are_those_of_transformers(vocab, seed, temperature, top_k, top_p, min_p):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 2
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = transformers_distribution(logits, params)
    assert (distribution(logits, params) - expected).abs().max() < 1.1e-3
    by_sorting = distribution(logits, params, points=503, with_filter=draw_sorted)
    assert (by_sorting - expected).abs().max() < 4.1e-3


def test_rows_of_one_batch_keep_their_own_filters():
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(6, VOCAB, generator=generator)
    knobs = [(0, 0.9, 0.0), (1, 1.0, 0.0), (5, 0.5, 0.0), (0, 1.0, 0.2), (1000, 1.0, 0.0), (3, 0.99, 0.1)]
    scaled = logits - logits.amax(-1, keepdim=True)
    columns = [torch.tensor([float(knob[i]) for knob in knobs]) for i in range(3)]
    for u in torch.linspace(0, 0.999, 101, dtype=torch.float64):
        together = draw_filtered(scaled, u.expand(6), *columns)
        alone = [draw_filtered(scaled[i : i + 1], u[None], *(c[i : i + 1] for c in columns))[0] for i in range(6)]
        assert together.tolist() == [int(a) for a in alone]


@pytest.mark.parametrize("penalty", [0.5, 1.1, 2.0])
def test_repetition_penalty_is_that_of_transformers(penalty):
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3))
    seen = torch.tensor([PROMPT + ANSWER])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
    torch.testing.assert_close(adjusted(logits, request(SamplingParams(repetition_penalty=penalty))), expected)


def test_frequency_counts_and_presence_does_not_and_neither_sees_the_prompt():
    logits = torch.zeros(1, VOCAB)
    out = adjusted(logits, request(SamplingParams(frequency_penalty=0.25, presence_penalty=1.0)))[0]
    expected = torch.zeros(VOCAB)
    expected[2] = -3 * 0.25 - 1.0  # three times in the answer
    expected[5] = -0.25 - 1.0  # twice in the prompt, once in the answer
    torch.testing.assert_close(out, expected)


def test_penalties_of_a_batch_do_not_mix():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(5, VOCAB, generator=generator)
    requests = [
        request(SamplingParams(repetition_penalty=1.3), row=2),
        request(SamplingParams(), row=1),
        request(SamplingParams(presence_penalty=0.5), prompt=[1], answer=[], row=0),
        request(SamplingParams(frequency_penalty=-1.0, logit_bias={0: 4.0, 39: -100}), answer=[0, 0, 7], row=4),
        request(SamplingParams(presence_penalty=2, repetition_penalty=0.7), prompt=[1, 2], answer=[4, 4], row=3),
    ]
    alone = torch.cat([adjusted(logits[i : i + 1], r) for i, r in enumerate(requests)])
    for r in requests:
        r.in_penalties = False
    torch.testing.assert_close(adjusted(logits, *requests), alone)
    assert torch.equal(alone[1:3], logits[1:3])
    assert alone[3, 0] == pytest.approx(float(logits[3, 0]) + 4 + 2)


def test_penalties_follow_the_answer_as_it_grows():
    chooser = sampler()
    growing = request(SamplingParams(temperature=0, frequency_penalty=2.0), answer=[])
    logits = torch.tensor([3.0, 2.5, 0.0] + [-50.0] * (VOCAB - 3))
    made = []
    for _ in range(6):
        token = chooser.choose(logits[None].clone(), [growing]).read()[0][0]
        growing.tokens.append(token)
        made.append(token)
    assert made == [0, 1, 0, 1, 2, 0] or made == [0, 1, 0, 1, 0, 2]
    assert made.count(0) == 3 and made.count(2) == 1


def test_the_kernel_for_repetition_does_as_the_general_way_does():
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(4)
    params = [SamplingParams(repetition_penalty=1.3), SamplingParams(repetition_penalty=0.8)]
    requests = [request(params[0], row=2), request(params[1], prompt=[4, 1], answer=[], row=0)]
    ours, theirs = sampler()._penalties, sampler()._penalties
    for token in (7, 9, 7):  # each is one more that counts
        logits = torch.randn(3, VOCAB, generator=generator)
        wanted = logits.clone()
        theirs.apply(wanted, [2, 0], requests)
        for r in requests:
            r.in_penalties = False
        ours._table(requests)
        ours._repetition(logits, [2, 0], requests, max(r.length for r in requests))
        assert torch.allclose(logits, wanted, rtol=1e-6) and not torch.equal(logits[0], logits[1])
        for penalties in (ours, theirs):
            penalties.append(torch.tensor([token, token + 1]))
        for r, chosen in zip(requests, (token, token + 1), strict=True):
            assert ours._tokens[r.row, r.length] == theirs._tokens[r.row, r.length] == chosen
        for r, chosen in zip(requests, (token, token + 1), strict=True):
            r.tokens.append(chosen)


class Launches(TorchDispatchMode):
    """The names of the operations on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def launches(chooser: Sampler, *requests: Request) -> list[str]:
    with Launches() as seen:
        chooser.choose(torch.zeros(len(requests), VOCAB), list(requests))
    return seen.names


def test_penalties_never_ask_the_device_for_a_value_and_cost_the_others_nothing():
    chooser = sampler()
    plain = [request(SamplingParams(temperature=0), row=0), request(SamplingParams(seed=1), row=1)]
    before = launches(chooser, *plain)
    penalties = {"repetition_penalty": 1.1, "frequency_penalty": 0.5, "presence_penalty": 0.5}
    penalised = request(SamplingParams(temperature=0, **penalties), row=2)
    first = launches(chooser, penalised, *plain)
    penalised.pending = 1
    second = launches(chooser, penalised, *plain)
    for name in ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "equal"):
        assert name not in first + second
    assert "scatter_add_" in second
    assert launches(chooser, *plain) == before


def test_a_token_that_the_host_has_not_read_is_penalised():
    generator = torch.Generator().manual_seed(9)
    logits = torch.randn(2, 2, VOCAB, generator=generator)
    params = SamplingParams(temperature=0, repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=0.5)
    chooser = sampler()
    ahead = [request(params, row=1), request(params, row=0, prompt=[4], answer=[])]
    first = chooser.choose(logits[0].clone(), ahead).tokens
    for r in ahead:
        r.pending = 1
    known = [
        request(params, answer=[*ANSWER, int(first[0])]),
        request(params, prompt=[4], answer=[int(first[1])], row=1),
    ]
    out = logits[1].clone()
    chooser._adjust(out, ahead)
    assert torch.equal(out, adjusted(logits[1], *known))
    assert not torch.equal(out, adjusted(logits[1], request(params), request(params, prompt=[4], answer=[], row=1)))


def test_no_stop_before_min_tokens():
    logits = torch.zeros(2, VOCAB)
    logits[:, 7] = 10.0
    early = request(SamplingParams(temperature=0, min_tokens=5), stop_ids=[7, 8])  # four so far
    late = request(SamplingParams(temperature=0, min_tokens=4), stop_ids=[7, 8], row=1)
    tokens, _ = sampler().choose(logits, [early, late]).read()
    assert tokens[0] not in (7, 8) and tokens[1] == 7


def test_the_kernels_for_few_tokens_draw_as_the_general_way_does():
    pytest.importorskip("triton")
    banned, vocab = [17, 3], 1000
    logits = torch.randn(6, vocab + 9, generator=torch.Generator().manual_seed(3)) * 3
    params = [
        SamplingParams(top_k=20, top_p=0.8, temperature=0.7),
        SamplingParams(temperature=0),
        SamplingParams(top_k=5, repetition_penalty=1.3, min_p=0.05),
        SamplingParams(temperature=0, presence_penalty=2.0, logit_bias={5: 4.0}),
        SamplingParams(top_k=64, min_tokens=9),
        SamplingParams(top_k=1, temperature=5.0),
    ]
    seen = set()
    for seed in range(30):
        if seed == 4:  # each of them costs the interpreter a round of every row
            params[4] = SamplingParams(top_k=24, min_tokens=9)
        requests = [request(p, row=i, seed=seed, stop_ids=[7, 8]) for i, p in enumerate(params)]
        known = sampler(vocab, banned)
        wanted = known._general(logits.clone(), requests)
        for r in requests:
            r.in_penalties = False
        chooser = sampler(vocab, banned)
        got = chooser._among_few(logits.clone(), requests)
        assert got.tolist() == wanted.tolist()
        seen.add(tuple(got.tolist()))
        for r in requests:  # the tokens that were chosen count from now on
            r.tokens.append(int(got[requests.index(r)]))
        assert (
            chooser._among_few(logits.clone(), requests).tolist() == known._general(logits.clone(), requests).tolist()
        )
    assert len(seen) > 10
    logits[2, 4] = math.nan
    assert sampler(vocab)._among_few(logits, requests)[2] == -1


def test_padding_and_banned_rows_are_never_drawn():
    logits = torch.zeros(64, 128)
    logits[:, 100:] = 1000.0
    logits[:, 17] = 1000.0
    params = [SamplingParams(temperature=2.0), SamplingParams(temperature=0), SamplingParams(top_p=0.9)]
    requests = [request(params[i % 3], row=0, seed=i) for i in range(64)]
    tokens, _ = sampler(100, banned=[17]).choose(logits, requests).read()
    assert all(0 <= t < 100 and t != 17 for t in tokens) and len(set(tokens)) > 20


def test_logprobs_are_log_softmax_of_the_raw_logits():
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(11))
    expected = logits.log_softmax(-1)
    requests = [
        request(SamplingParams(logprobs=3, temperature=0.3, repetition_penalty=1.5, logit_bias={1: 50.0})),
        request(SamplingParams(), row=1),
        request(SamplingParams(logprobs=0, temperature=0), row=2),
    ]
    tokens, logprobs = sampler().choose(logits.clone(), requests).read()
    assert tokens[0] == 1 and logprobs[1] is None and logprobs[2].top == ()
    for i in (0, 2):
        assert logprobs[i].token_id == tokens[i]
        assert logprobs[i].logprob == pytest.approx(float(expected[i, tokens[i]]), abs=1e-6)
    best = expected[0].topk(3)
    assert [t for t, _ in logprobs[0].top] == best.indices.tolist()
    assert [p for _, p in logprobs[0].top] == pytest.approx(best.values.tolist(), abs=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 3, "logprobs": 2}])
def test_a_row_that_is_not_finite_is_told_and_the_others_are_not_touched(bad, params):
    logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(2))
    requests = [request(SamplingParams(**params), row=i, seed=i) for i in range(3)]
    good, _ = sampler().choose(logits.clone(), requests).read()
    logits[1, 5] = bad
    tokens, _ = sampler().choose(logits, requests).read()
    assert tokens == [good[0], -1, good[2]]


def test_a_seed_gives_the_same_draw_alone_and_in_a_batch():
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2))
    requests = [
        request(SamplingParams(seed=5), row=0),
        request(SamplingParams(temperature=0), row=1),
        request(SamplingParams(top_p=0.8, seed=-3), row=2),
        request(SamplingParams(seed=6, presence_penalty=1.0), row=3),
    ]
    together, _ = sampler().choose(logits.clone(), requests).read()
    for r in requests:
        r.in_penalties = False
    assert together == [sampler().choose(logits[i : i + 1].clone(), [r]).read()[0][0] for i, r in enumerate(requests)]


def test_uniforms_are_uniform_and_differ_with_seed_answer_and_position():
    r = request(SamplingParams(seed=1))
    values = []
    for position in range(20000):
        r.tokens = [0] * (len(PROMPT) + position)
        values.append(uniform(r))
    counts = torch.histc(torch.tensor(values), 20, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 45  # chi-square, 19 degrees of freedom: p = 0.0007
    assert len(set(values)) == len(values)
    others = [request(SamplingParams(seed=1)), request(SamplingParams(seed=2))]
    others[0].index = 1
    assert values[len(ANSWER)] not in map(uniform, others)
    assert uniform(request(SamplingParams(seed=1))) == values[len(ANSWER)]  # whatever was drawn before it


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 1100), st.integers(0, 10**6))
def test_row_max_is_max(rows, width, seed):
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    top, ids = row_max(logits)
    assert torch.equal(top, logits.amax(-1)) and torch.equal(ids, logits.argmax(-1))
