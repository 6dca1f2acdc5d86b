"""What a step costs, where its time goes, and qwenfit beside transformers on the same weights; on tiny models."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from qwenfit.bench import compare as comparing
from qwenfit.bench import peers
from qwenfit.bench.compare import agreement, compare, comparison_table
from qwenfit.bench.cost import Limits, cost_figures, decode_cost, measured_limits, prefill_cost
from qwenfit.bench.memory import linear_bytes
from qwenfit.bench.profile import REST, KernelUse, Sizes, by_name, profile_decode, profile_prefill, profile_table
from qwenfit.bench.record import Figure, Record
from qwenfit.bench.verb import _hold
from qwenfit.engine.llm import LLM
from qwenfit.errors import BeyondTolerance, QwenfitError
from qwenfit.planning.planner import plan
from qwenfit.run.planned import RunOptions

LIMITS = Limits(1e10, 1e11)
TABLE: dict[str, Any] = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 128, "vocab_size": 300,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
    "torch_dtype": "float32",
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(TABLE))
    return str(tmp_path / "tiny")


def options(model: str, precision: str = "fp32") -> RunOptions:
    return RunOptions(model, precision=precision, random_weights=True, device="cpu")


# Cost


def test_a_step_of_7b_costs_what_the_shapes_say() -> None:
    made = plan("Qwen-7B", gpu="H200", precision="bf16", prompt=1, generate=2048, advise=False)
    cost = decode_cost(made)
    assert cost.nbytes == 15_442_649_088 - 151936 * 4096 * 2 + 1025 * 524_288  # all but the embedding; mean cache
    assert cost.flops == 2 * (32 * (4096 * 12288 + 4096 * 4096 + 3 * 4096 * 11008) + 151936 * 4096)
    many = plan("Qwen-7B", gpu="H200", precision="bf16", prompt=1, generate=2048, batch=4, advise=False)
    assert decode_cost(many).flops == 4 * cost.flops
    assert decode_cost(many).nbytes - cost.nbytes == 3 * 1025 * 524_288


def test_a_prompt_reads_the_weights_once_for_each_chunk() -> None:
    one, two = (
        prefill_cost(plan("Qwen-7B", gpu="H200", precision="bf16", prompt=n, generate=1, advise=False))
        for n in (2048, 4096)
    )
    assert two.nbytes == 2 * one.nbytes and two.flops > 2 * one.flops


def test_the_card_has_rates_and_shares_of_what_was_measured() -> None:
    cost = decode_cost(plan("Qwen-7B", gpu="H200", precision="bf16", prompt=1, generate=2048, advise=False))
    found = {figure.name: figure for figure in cost_figures(cost, 0.004, Limits(4e12, 8e14), launches=198)}
    assert found["bytes_per_s"].measured == pytest.approx(cost.nbytes / 0.004 / 1e9)
    assert found["read_share"].measured == pytest.approx(cost.nbytes / 0.004 / 4e12)
    assert found["flops_share"].measured == pytest.approx(cost.flops / 0.004 / 8e14)
    assert found["launches"].measured == 198 and all(figure.planned is None for figure in found.values())
    assert "launches" not in {figure.name for figure in cost_figures(cost, 0.004, LIMITS, None)}


def test_limits_of_this_cpu_are_those_of_a_computer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenfit.detect.measure_bandwidth", lambda: 5e9)
    limits = measured_limits("cpu")
    assert limits.read == 5e9 and 1e8 < limits.flops < 1e14


# Profile


@pytest.fixture
def llm() -> LLM:
    from tests.bench.test_guide_run import TINY, tiny_model

    return LLM.from_parts(tiny_model(TINY, "int8"), TINY, None, max_model_len=64, max_num_seqs=2, num_blocks=8)


def test_the_profile_of_a_step_counts_each_layer_and_its_bytes(llm: LLM) -> None:
    uses = {use.name: use for use in profile_decode(llm, Sizes(4, 20, 2))}
    assert {name: uses[name].launches for name in ("qkv_proj", "o_proj", "attention", "lm_head", "norm")} == {
        "qkv_proj": 2, "o_proj": 2, "attention": 2, "lm_head": 1, "norm": 5,
    }  # fmt: skip
    plain, packed = linear_bytes(llm)
    linears = sum(uses[n].nbytes or 0 for n in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"))
    assert linears == plain + packed
    assert uses["attention"].nbytes == 2 * 14 * (2 * 2 * 2 * 32 * 2)  # 2 requests of 4 + 10 tokens
    assert REST in uses and all(use.microseconds > 0 for use in uses.values())
    assert not llm.engine.has_work and llm.engine.scheduler.pool.num_free == 8
    assert not any("forward" in vars(module) for module in llm.engine.runner.model.modules())  # type: ignore[attr-defined]


def test_answers_too_short_have_no_profile_and_prompts_have_one(llm: LLM) -> None:
    assert profile_decode(llm, Sizes(4, 7)) == []
    uses = {use.name: use for use in profile_prefill(llm, Sizes(20, 1, 2))}
    assert uses["qkv_proj"].launches == 2 and not llm.engine.has_work


def test_launches_of_one_kernel_add_up_and_print() -> None:
    uses = by_name([("_attend", 2.0), ("_bf16_matvec" + "x" * 90, 5.0), ("_attend", 3.0)])
    assert [(use.launches, use.microseconds, len(use.name)) for use in uses] == [(2, 5.0, 7), (1, 5.0, 70)]
    table = profile_table([*uses, KernelUse("known", 1, 10.0, 40_000_000)], "one decode step").splitlines()
    assert "4,000" in table[3] and "50.0%" in table[3] and table[-1].split() == ["all", "4", "20.0"]


# Tolerances


@pytest.mark.parametrize(
    ("device", "tolerance", "name", "measured", "held"),
    [
        ("cuda", None, "decode_tokens_per_s", 112.0, False),
        ("cuda", None, "decode_tokens_per_s", 108.0, True),
        ("cuda", None, "allocated", 103.0, False),
        ("cuda", None, "time_to_first_token", 200.0, True),  # nothing was said about it
        ("cuda", 0.5, "allocated", 103.0, True),
        ("cpu", None, "process", 300.0, True),
        ("cpu", 0.1, "process", 300.0, False),
    ],
)
def test_a_gpu_is_held_to_the_tolerances_of_its_figures(
    device: str, tolerance: float | None, name: str, measured: float, held: bool
) -> None:
    figures = (Figure(name, "x", 100.0, measured),)
    made = Record("decode", "m", "bf16", "d", "c", {}, figures, facts={"device": device})
    if held:
        _hold(made, tolerance)
    else:
        with pytest.raises(BeyondTolerance) as raised:
            _hold(made, tolerance)
        assert raised.value.exit_code == 6


# Compare


def test_transformers_answers_with_our_weights_as_we_do(tiny: str) -> None:
    made = compare(options(tiny), Sizes(12, 10, 2, 2), LIMITS)
    (name,) = made.peers
    facts = made.record.facts["peers"][name]
    assert name.startswith("transformers 5") and facts["same_greedy_tokens"] == 1.0
    ours = made.record.to_dict()["measured"]
    for figure in comparing.SPEEDS:
        assert facts["ratio"][figure] == pytest.approx(ours[figure] / facts["measured"][figure])
    assert json.loads(json.dumps(made.record.to_dict()))["facts"]["rounds"] == 2
    table = comparison_table(made)
    assert "100% of the greedy tokens the same" in table and " x" in table and "llama.cpp is left out" in table


def test_packed_weights_are_compared_with_what_they_stand_for(tiny: str) -> None:
    made = compare(options(tiny, "int8"), Sizes(12, 4, 1, 1), LIMITS)
    (facts,) = made.record.facts["peers"].values()
    assert facts["same_greedy_tokens"] > 0.5  # float32 here, integers times scales there


def test_what_is_not_installed_is_named(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else find(name, *rest)
    )
    made = compare(options(tiny), Sizes(4, 4, 1, 1), LIMITS)
    assert made.peers == {} and "pip install transformers" in comparison_table(made)


class FakeLlama:
    """llama-cpp-python's interface, as far as it is used: counts what it is given."""

    def __init__(self, **settings: Any) -> None:
        self.settings, self.seen = settings, []

    def reset(self) -> None:
        self.seen = []

    def eval(self, tokens: list[int]) -> None:
        self.seen += tokens

    def sample(self, temp: float) -> int:
        assert temp == 0.0
        return len(self.seen)


def test_llama_cpp_takes_part_where_the_model_is_a_gguf(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("llama_cpp")
    vars(module).update(Llama=FakeLlama, __version__="0.3", __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setattr(peers, "llama_fault", lambda path, device: "")
    monkeypatch.setattr(peers, "transformers_peer", lambda llm: peers.Peer("t", "", None))  # type: ignore[arg-type]
    found, notes = peers.find_peers(llm, "model.gguf", 1)
    assert [peer.name for peer in found] == ["t", "llama.cpp 0.3"] and notes == []
    timed, answers = found[1].run([[7, 8, 9]], 4)
    assert answers == [[3, 4, 5, 6]] and timed.total > 0
    assert peers.find_peers(llm, "model.gguf", 2)[1] == [
        "llama.cpp is left out: it is compared with one request at a time."
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "an instruction that this machine lacks"),
        ("raise ValueError('Failed to load model from file')", "Failed to load model"),
        ("raise SystemExit(3)", "it ended with 3"),
    ],
)
def test_a_llama_cpp_that_dies_is_left_out_and_said(
    llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    (tmp_path / "llama_cpp.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(peers, "transformers_peer", lambda llm: peers.Peer("t", "", None))  # type: ignore[arg-type]
    found, notes = peers.find_peers(llm, "model.gguf", 1)
    assert [peer.name for peer in found] == ["t"]
    assert notes[0].startswith("llama.cpp is left out: ") and said in notes[0]


def test_agreement_counts_up_to_the_first_difference() -> None:
    assert agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 0, 6]]) == pytest.approx(4 / 6)


def test_an_answer_that_ends_early_is_no_measurement(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwenfit.bench.run import timed_run

    monkeypatch.setattr(llm.engine.runner.model, "logits", lambda hidden: torch.full((len(hidden), 256), float("nan")))
    with pytest.raises(QwenfitError, match="ended early"):
        timed_run(llm, 4, 4, 1, seed=0)


def test_a_prefill_is_planned_for_one_prompt_alone(tiny: str) -> None:
    made = plan(tiny, gpu="H200", precision="fp32", prompt=8, generate=4, batch=2, advise=False)
    assert comparing._planned(made, Sizes(8, 4, 2))["prompt_tokens_per_s"] is None
    alone = replace(made, task=replace(made.task, batch=1))  # type: ignore[type-var]
    assert comparing._planned(alone, Sizes(8, 4, 1))["prompt_tokens_per_s"] is not None
