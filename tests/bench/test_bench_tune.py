"""`qwenfit bench tune` on a tiny model: every method is planned, run and recorded beside guide and peers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner

from qwenfit.bench.record import Figure
from qwenfit.bench.tune import bench_cell, beyond, guide_figures, peer_figures, with_defaults
from qwenfit.bench.tune_table import TABLE, cell_line, table_cells
from qwenfit.cli_run import bench
from qwenfit.errors import BeyondTolerance, UsageError
from qwenfit.planning.planner import plan
from qwenfit.planning.task import Finetune
from qwenfit.tune.config import TuneConfig

TINY = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 300, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 256, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    return str(folder)


@pytest.mark.parametrize(
    ("method", "precision"), [("full", "fp32"), ("lora", "fp32"), ("lora-emb", "fp32"), ("qlora", None)]
)
def test_every_method_is_measured_beside_its_plan(tiny, method, precision):
    settings = TuneConfig(
        tiny, method=method, precision=precision, seq_len=16, grad_accum=2, lora_rank=4, device="cpu", lr=1e-2
    )
    made, trainee = bench_cell(with_defaults(settings), steps=2, matmul=1e9)
    figures = {f.name: f for f in made.figures}
    seconds = figures["seconds_per_iter"]
    assert seconds.planned and seconds.measured > 0 and len(made.facts["seconds"]) == 2
    assert figures["tokens_per_s"].measured == pytest.approx(32 / seconds.measured)
    assert figures["process"].planned and figures["process"].measured > 0.1
    assert figures["product_share"].measured == pytest.approx(figures["flops"].measured * 1e12 / 1e9)
    assert len(made.facts["losses"]) == 3 and all(4 < loss < 9 for loss in made.facts["losses"])
    assert made.precision == (precision or "int4") and made.kind == "tune"
    assert f"{method} " in cell_line(made)
    _, again = bench_cell(with_defaults(replace(settings, seq_len=8)), steps=1, trainee=trainee, matmul=1e9)
    assert again is trainee  # another length trains the same weights


def test_the_record_is_written_and_a_plan_that_was_off_is_exit_code_6(tiny, tmp_path):
    command = ["tune", tiny, "--seq-len", "16", "--precision", "fp32", "--device", "cpu", "--repeat", "1"]
    done = CliRunner().invoke(bench, [*command, "--record", str(tmp_path), "--json"], catch_exceptions=False)
    (record,) = json.loads(done.stdout)
    (written,) = tmp_path.glob("tune-*.json")
    assert json.loads(written.read_text())["measured"] == record["measured"]
    assert record["facts"]["cell"]["method"] == "lora" and record["facts"]["guide"] is None
    with pytest.raises(BeyondTolerance) as caught:
        CliRunner().invoke(bench, [*command, "--no-record", "--tolerance", "0"], catch_exceptions=False)
    assert caught.value.exit_code == 6


def test_a_gpu_is_held_to_3_and_12_percent_and_a_cpu_to_nothing(tiny):
    settings = TuneConfig(tiny, method="lora", precision="fp32", seq_len=8, grad_accum=1, device="cpu")
    made, _ = bench_cell(settings, steps=1, matmul=1e9)
    assert beyond([made], None) is None
    for planned, measured, held in ((1.0, 1.02, True), (1.0, 1.04, False)):
        figures = (Figure("allocated", "GB", planned, measured),)
        gpu = replace(made, facts=made.facts | {"device": "cuda"}, figures=figures)
        assert (beyond([gpu], None) is None) == held
    slow = replace(made, facts=made.facts | {"device": "cuda"}, figures=(Figure("seconds_per_iter", "s", 1.0, 1.1),))
    assert beyond([slow], None) is None and beyond([slow], 0.05) is not None


def test_the_guides_figures_and_the_peers_stand_beside_their_cells():
    assert guide_figures("Qwen-7B", Finetune("lora", 1024)) == {"s_per_iter": 2.8, "memory_gb": 21.5}
    assert guide_figures("Qwen-7B", Finetune("lora", 1000)) is None
    assert guide_figures("Qwen-7B", Finetune("lora", 1024, grad_accum=4)) is None
    assert [p["s_per_iter"] for p in peer_figures("Qwen-7B", Finetune("lora", 8192))] == [13.11, 11.37]
    assert peer_figures("Qwen-7B", Finetune("qlora", 8192)) == []


def test_the_table_is_of_cells_that_are_planned_in_one_h100():
    cells = table_cells("cpu")
    assert len(cells) == len(TABLE) and {c.seq_len for c in cells if c.method == "lora"} >= {256, 1024, 4096, 8192}
    for cell in cells:
        assert (cell.micro_batch, cell.grad_accum, cell.lora_rank) == (1, 8, 64)
        made = plan(
            cell.model, cell.method, seq_len=cell.seq_len, optimizer=cell.optimizer, gpu="H100-SXM5-80GB", advise=False
        )
        assert made.fits


@pytest.mark.parametrize(
    "arguments",
    [
        ["tune"],
        ["tune", "Qwen-7B", "--table"],
        ["decode", "Qwen-7B", "--method", "lora"],
        ["decode", "Qwen-7B", "--peers"],
    ],
)
def test_options_that_do_not_go_together_are_usage_errors(arguments):
    with pytest.raises(UsageError):
        CliRunner().invoke(bench, arguments, catch_exceptions=False)


def test_transformers_and_peft_run_the_same_cell(tiny):
    pytest.importorskip("peft")
    from qwenfit.bench.tune_peers import bench_peers

    settings = TuneConfig(tiny, method="lora", precision="fp32", seq_len=8, grad_accum=1, lora_rank=4, device="cpu")
    (result,) = bench_peers(settings, steps=1)
    assert result["s_per_iter"] > 0 and 4 < result["losses"][0] < 9 and "peft" in result["software"]
    with pytest.raises(UsageError):
        bench_peers(replace(settings, method="qlora", precision="int4"), steps=1)
