"""The engine on the steps of a GPU (fused prompts, recorded decoding), played by Triton's interpreter on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from fakes import assert_empty, run_to_end, tokens_of
from test_network_any_order import NETWORK, network_alone, real_engine

from qwenfit.engine import runner, sampler
from qwenfit.engine.params import SamplingParams

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("plays a GPU where there is none", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
from qwenfit.engine import prompt_graphs
from qwenfit.engine.costs import Costs
from qwenfit.engine.graphs import DecodeGraphs
from qwenfit.engine.prompt_graphs import PromptGraphs, PromptStep
from qwenfit.kernels.triton import bf16_matvec
from qwenfit.model import prefill
from qwenfit.model.decode import DecodeStep


class Replayed:
    """Stands in for a CUDA graph of what `run` does."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.run, self.replays = run, 0

    def replay(self) -> None:
        self.replays += 1
        self.run()


# Of blocks that hold nothing yet, where the test has put NaN, a maximum is taken that nothing uses.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice")


@pytest.fixture
def gpu(monkeypatch):
    def record(graphs: DecodeGraphs, size: int, step: DecodeStep) -> None:
        graphs._recorded[size] = step, Replayed(lambda: graphs._run(step))

    monkeypatch.setattr(runner, "_fused", lambda *_: True)
    monkeypatch.setattr(bf16_matvec, "tuned", lambda *_: {"rows": 32, "columns": 64, "warps": 4})  # few programs
    monkeypatch.setattr(DecodeGraphs, "_record", record)
    monkeypatch.setattr(sampler, "to_host", torch.clone)  # as a GPU does: a copy of what is there now


def test_answers_are_those_of_the_plain_network(gpu, monkeypatch):
    """A prompt in parts beside a sequence that decodes; tokens are read a step late, steps with prompts padded."""
    rows = []

    def padded_prefill(model, batch, cache, wanted):
        rows.append((len(batch.input_ids), len(wanted)))
        return plain_prefill(model, batch, cache, wanted)

    plain_prefill = prefill.prefill
    monkeypatch.setattr(prefill, "prefill", padded_prefill)
    engine = real_engine(*NETWORK, num_blocks=4, block_size=8, max_num_seqs=2, max_batched_tokens=8, lookahead=True)
    for layer in engine.runner.cache.layers:  # warming up has written to it
        layer.key.fill_(torch.nan)
        layer.value.fill_(torch.nan)
    prompts = [[7, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    ids = [engine.add(prompt, params) for prompt in prompts]
    made = run_to_end(engine)
    assert [tokens_of(made[i, 0]) for i in ids] == [network_alone(prompt, params) for prompt in prompts]
    assert sum(graph.replays for _, graph in engine.runner._graphs._recorded.values()) > 0
    assert rows[1:] == [(8, 8), (8, 8)]  # 2 + 6 tokens, then 1 + 4; the first is for warming up
    assert_empty(engine)


def test_a_prompt_that_comes_alone_is_padded_and_replayed(gpu, monkeypatch):
    """Its first step runs as it is, the second of a length is recorded; what follows finds its keys in the cache."""
    monkeypatch.setattr(prompt_graphs, "LENGTHS", (4, 8))
    replays = []

    def record(graphs: PromptGraphs, step: PromptStep):
        logits = step.run().clone()
        replays.append(step.size)
        return Replayed(lambda: logits.copy_(step.run())), logits

    monkeypatch.setattr(PromptGraphs, "_record", record)
    engine = real_engine(*NETWORK, num_blocks=4, block_size=8, max_num_seqs=2, max_batched_tokens=16, lookahead=True)
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    for prompt in ([7, 3, 1], [1, 2, 3, 4, 5, 6], [9, 8], [3, 9, 27, 1, 4, 1, 5], [5, 5, 5, 1], list(range(9))):
        request = engine.add(prompt, params)
        made = run_to_end(engine)
        assert tokens_of(made[request, 0]) == network_alone(prompt, params)
    assert replays == [4, 8]  # the last prompt is longer than any
    assert_empty(engine)


@pytest.mark.parametrize("launching", [10.0, 0.0])
def test_a_prompt_runs_apart_where_the_host_takes_longer(gpu, monkeypatch, launching):
    """The others' step is then a replay, and the prompt's one of its own."""
    monkeypatch.setattr(prompt_graphs, "LENGTHS", (8,))
    prompts = []

    def record(graphs: PromptGraphs, step: PromptStep):
        logits = step.run().clone()
        prompts.append(Replayed(lambda: logits.copy_(step.run())))
        return prompts[-1], logits

    monkeypatch.setattr(PromptGraphs, "_record", record)
    engine = real_engine(*NETWORK, num_blocks=9, block_size=8, max_num_seqs=3, max_batched_tokens=16, lookahead=True)
    engine.runner._costs = Costs(launching, {2: 1.0, 4: 1.0}, 0.1)
    engine.runner._prompts.prepare(8)
    measured = prompts[0].replays
    params = [SamplingParams(max_tokens=count, temperature=0, ignore_eos=True) for count in (14, 3)]
    asked = [([7, 3], params[0])]
    ids = [engine.add(*asked[0])]
    deltas = [delta for _ in range(3) for delta in engine.step()]
    for length in (5, 6, 4):
        asked.append((list(range(length)), params[1]))
        ids.append(engine.add(*asked[-1]))
        deltas += [delta for _ in range(3) for delta in engine.step()]
    while engine.has_work:
        deltas += engine.step()
    for request, (prompt, wanted) in zip(ids, asked, strict=True):
        tokens = [token for delta in deltas if delta.request_id == request for token in delta.token_ids]
        assert tokens == network_alone(prompt, wanted)
    assert len(prompts) == 1 and prompts[0].replays - measured == (4 if launching else 1)  # the first comes alone
    assert_empty(engine)


def test_what_a_prompt_will_take_is_told_from_those_recorded():
    graphs = PromptGraphs(*NETWORK, None, torch.device("cpu"))
    assert graphs.expected(256) is None
    graphs.seconds = {64: 1.0, 256: 3.0}
    assert [graphs.expected(size) for size in (64, 128, 256, 1024)] == [1.0, 3.0, 3.0, 12.0]


def test_costs_weigh_the_host_against_both_parts():
    costs = Costs(5.0, {1: 1.0, 8: 2.0}, 0.01)
    assert costs.apart(1, 100, 2.9) and not costs.apart(1, 100, 3.1)
    assert costs.apart(2, 100, 1.9) and not costs.apart(2, 100, 2.1)
    assert not costs.apart(9, 0, 0.0)  # no such step is recorded
