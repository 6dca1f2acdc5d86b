"""The engine on the steps of a GPU (fused prompts, recorded decoding), played by Triton's interpreter on a CPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import test_network_any_order
import torch
from fakes import assert_empty, run_to_end, tokens_of
from test_network_any_order import NETWORK, network_alone, real_engine, tiny_transformer

from qwenfit.engine import runner, sampler
from qwenfit.engine.params import SamplingParams

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("plays a GPU where there is none", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
from qwenfit.engine import mixed_graphs, prompt_graphs
from qwenfit.engine.brought import Brought
from qwenfit.engine.costs import Costs
from qwenfit.engine.graphs import DecodeGraphs
from qwenfit.engine.mixed_graphs import MixedGraphs
from qwenfit.engine.padding import padded
from qwenfit.engine.prompt_graphs import PromptGraphs, PromptStep
from qwenfit.kernels.triton import bf16_matvec, decode_attention
from qwenfit.model import prefill
from qwenfit.model.decode import DecodeStep
from qwenfit.tune.adapters import LoRA, add_lora, lora_layers


class Replayed:
    """Stands in for a CUDA graph of what `run` does."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.run, self.replays = run, 0

    def replay(self) -> None:
        self.replays += 1
        self.run()


# Of blocks that hold nothing yet, where the test has put NaN, a maximum is taken that nothing uses; rows of padding
# hold anything.
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:overflow", "ignore:invalid value")


@pytest.fixture
def gpu(monkeypatch):
    def record(graphs: DecodeGraphs, size: int, step: DecodeStep) -> None:
        graphs._recorded[size] = step, Replayed(lambda: graphs._run(step))

    monkeypatch.setattr(runner, "_fused", lambda *_: True)
    monkeypatch.setattr(bf16_matvec, "tuned", lambda *_: {"rows": 32, "columns": 64, "warps": 4})  # few programs
    monkeypatch.setattr(decode_attention, "tuned", lambda *_: {"tokens": 32, "warps": 16})
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


def test_an_adapter_that_is_not_merged_runs_beside_the_weights(gpu, monkeypatch):
    """As one beside int4 weights does: nothing is recorded, and the linears have no weight of their own."""
    model, config = tiny_transformer()
    add_lora(model, LoRA(rank=2, alpha=8))
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for up in layer.lora_B:
                up.normal_(std=0.3)
    prompts = [[7, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    without = [network_alone(prompt, params) for prompt in prompts]
    monkeypatch.setattr(test_network_any_order, "NETWORK", (model.eval(), config))
    monkeypatch.setattr(test_network_any_order, "ALONE", {})
    wanted = [network_alone(prompt, params) for prompt in prompts]
    engine = real_engine(model, config, num_blocks=4, block_size=8, max_num_seqs=2, max_batched_tokens=8)
    ids = [engine.add(prompt, params) for prompt in prompts]
    made = run_to_end(engine)
    assert [tokens_of(made[i, 0]) for i in ids] == wanted != without
    assert engine.runner._graphs is None
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


def recorded_mixed(monkeypatch) -> list[Replayed]:
    """Small sizes of steps with prompts are recorded; their replays."""
    replayed = []

    def record(graphs: MixedGraphs, size: int) -> bool:
        if size not in graphs._recorded:
            step = graphs._step(size)
            step.run()
            replayed.append(Replayed(step.run))
            graphs._recorded[size], graphs.seconds[size] = (step, replayed[-1]), size / 8
        return True

    monkeypatch.setattr(mixed_graphs, "SIZES", (8, 16))
    monkeypatch.setattr(mixed_graphs, "USUAL", 8)
    monkeypatch.setattr(mixed_graphs, "BEFORE", 16)
    monkeypatch.setattr(mixed_graphs, "CONFIG", {"m": 16, "n": 16, "warps": 1, "stages": 1})
    monkeypatch.setattr(mixed_graphs, "WIDE_CONFIG", {"m": 16, "n": 16, "warps": 1, "stages": 1})
    monkeypatch.setattr(MixedGraphs, "_record", record)
    return replayed


def mixed_engine(launching: float, **options):
    engine = real_engine(*NETWORK, **{"block_size": 8, "max_num_seqs": 4, "max_batched_tokens": 16, **options})
    engine.runner._mixed.record(Costs(launching, 0.01))
    return engine


@pytest.mark.parametrize(("launching", "sizes"), [(10.0, {8, 16}), (0.9, {8}), (0.0, {8})])
def test_a_step_with_prompts_is_replayed_where_the_host_takes_longer(gpu, monkeypatch, launching, sizes):
    """Prompts whole and in parts, on their own and beside sequences that decode: the same answers."""
    replayed = recorded_mixed(monkeypatch)
    engine = mixed_engine(launching, num_blocks=24, lookahead=True)
    for layer in engine.runner.cache.layers:  # warming up has written to it
        layer.key.fill_(torch.nan)
        layer.value.fill_(torch.nan)
    assert engine.runner._mixed._recorded.keys() == sizes
    params = [SamplingParams(max_tokens=count, temperature=0, ignore_eos=True) for count in (9, 3)]
    lengths = (2, 15, 4, 13, 9, 14, 3, 1, 16, 20, 12, 12)
    lengths = lengths if launching else lengths[:5]  # all of them are launched, as with 0.9
    asked = [([(7 * i + j) % 40 for j in range(length)], params[i % 2]) for i, length in enumerate(lengths)]
    ids, deltas = [], []
    for i, (prompt, wanted) in enumerate(asked):
        ids.append(engine.add(prompt, wanted))
        deltas += engine.step() if i % 3 == 0 else []
    while engine.has_work:
        deltas += engine.step()
    for request, (prompt, wanted) in zip(ids, asked, strict=True):
        tokens = [token for delta in deltas if delta.request_id == request for token in delta.token_ids]
        assert tokens == network_alone(prompt, wanted)
    assert (sum(graph.replays for graph in replayed) > 5) == (launching == 10.0)
    assert_empty(engine)


def test_what_a_recorded_step_has_no_room_for_is_launched(gpu, monkeypatch):
    """More prompts, or more of them in the cache, than it was made for; a prompt that NTK stretches."""
    recorded_mixed(monkeypatch)
    monkeypatch.setattr(mixed_graphs, "PROMPTS", 1)
    monkeypatch.setattr(mixed_graphs, "BEFORE", 0)
    engine = mixed_engine(10.0, num_blocks=24)
    step = engine.runner._mixed.take(9, 0)
    assert step.size == 16 and engine.runner._mixed.take(17, 0) is None

    def brought(*lengths: tuple[int, int]) -> Brought:
        count = sum(queries for queries, _ in lengths)
        queries, contexts = [queries for queries, _ in lengths], [context for _, context in lengths]
        return Brought([0] * count, [0] * count, [0] * count, [], queries, contexts)

    assert step.fits(brought((1, 90), (1, 7), (14, 16)))
    assert not step.fits(brought((1, 90), (14, 17)))  # the prompt's own tokens before
    assert not step.fits(brought((2, 2), (1, 1)))  # two prompts
    assert not step.fits(brought((1, 3), (16, 16)))
    assert not step.fits(brought(*[(1, 1)] * 5))
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    prompts = [list(range(20)), [4, 4, 4], [5, 6]]
    ids = [engine.add(prompt, params) for prompt in prompts]
    made = run_to_end(engine)
    assert [tokens_of(made[i, 0]) for i in ids] == [network_alone(prompt, params) for prompt in prompts]
    assert_empty(engine)


def test_recorded_sizes_are_ones_that_steps_are_padded_to():
    """Their products are loaded at the start."""
    assert all(padded(size) == size for size in mixed_graphs.SIZES)


def test_costs_weigh_the_host_against_the_padding(gpu, monkeypatch):
    recorded_mixed(monkeypatch)
    graphs = mixed_engine(10.0, num_blocks=4).runner._mixed
    graphs.seconds = {8: 1.0, 16: 3.0}
    graphs.costs = Costs(2.0, 0.01)
    assert graphs.take(5, 0).size == 8
    assert graphs.take(9, 0) is None  # 3.0 against 2.0
    assert graphs.take(16, 0).size == 16  # as long as it would take launched
    assert graphs.take(8, 500).size == 8 and graphs.take(7, 500) is None  # 6.0 against 5.875
    assert graphs.take(1, 0).size == 8
    graphs.costs = Costs(0.5, 0.01)
    assert graphs.take(1, 0) is None and graphs.take(7, 0) is None and graphs.take(8, 0).size == 8
    graphs.costs = Costs(2.9, 0.01)
    assert graphs.take(15, 0) is None  # the device alone: 2.75
    graphs.costs = Costs(3.1, 0.01)
    assert graphs.take(9, 0).size == 16
    assert graphs.take(9, 20) is None  # 3.2 against 3.1
