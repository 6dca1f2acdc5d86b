"""`qwenfit bench guide` on tiny models on the CPU: what runs, what the record holds, the page, and what goes wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qwenfit.bench import guide_page, guide_verb
from qwenfit.bench.guide_page import guide_page as page_of
from qwenfit.bench.guide_page import main, newest_record, page_is_fresh
from qwenfit.bench.guide_rows import BY_BATCH, BY_LENGTH, INFERENCE, Row, Run, grouped, guide_rows
from qwenfit.bench.guide_run import Bench, expected_seconds, plan_of, run_and_write, run_guide, tokens_for
from qwenfit.bench.refit import steps_of
from qwenfit.catalog import get_model
from qwenfit.config import ModelConfig
from qwenfit.errors import BadFile, NotFound, QwenfitError, UsageError
from qwenfit.hardware import find_device
from qwenfit.model.linear import Linear
from qwenfit.model.transformer import Transformer
from qwenfit.quantize.rtn import quantize_rtn

TINY = replace(
    get_model("Qwen-1.8B"),
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=128,
    vocab_size=256,
)
ROWS = [
    Row(INFERENCE, Run("Qwen-1.8B", "bf16", "bf16", 1, 24), 4.23, 54.09),
    Row(INFERENCE, Run("Qwen-1.8B", "int4", "bf16", 1, 24), 2.91, 71.07),
    Row(BY_BATCH, Run("Qwen-1.8B", "bf16", "bf16", 3, 12), None, whole=True),
    Row(BY_BATCH, Run("Qwen-1.8B", "bf16", "int8", 3, 12), 15.5),
    Row(BY_LENGTH, Run("Qwen-1.8B", "bf16", "bf16", 1, 24), 15.2),
]


def tiny_model(config: ModelConfig, precision: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config, torch.bfloat16)
    for name, parameter in list(model.named_parameters()):
        nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 1.0)
        module, _, leaf = name.rpartition(".")
        if precision != "bf16" and module.endswith("_proj") and leaf == "weight":
            packed = quantize_rtn(parameter.detach().float(), int(precision[3:]))
            bias = model.get_submodule(module).bias
            model.set_submodule(module, Linear.from_quantized(packed, bias, torch.bfloat16, "cpu"))  # type: ignore[arg-type]
    return model.requires_grad_(False).eval()


def bench(**changes: Any) -> Bench:
    limits = {"read": 1e10, "bf16": 1e11}
    given = {"device": find_device("H200"), "torch_device": "cpu", "make_model": tiny_model, "limits": limits}
    return Bench(**(given | {"config_of": lambda name: TINY} | changes))


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return run_guide(bench(), ROWS, tell=lambda text: None)


def test_the_guide_s_rows_are_its_twelve_and_both_cache_tables() -> None:
    rows = guide_rows()
    tables = [row.table for row in rows]
    assert [tables.count(t) for t in (INFERENCE, BY_BATCH, BY_LENGTH)] == [12, 12, 10]
    assert {row.run.tokens for row in rows if row.table == INFERENCE} == {2048}
    assert [row.run.batch for row in rows if row.table == BY_BATCH and row.gib is None] == [64, 100]
    assert all(row.whole == (row.run.batch == 100) for row in rows)
    assert len(grouped(rows)) == 12 and next(iter(grouped(rows))) == ("Qwen-7B", "bf16")
    assert sum(map(len, grouped(rows).values())) == 31  # three cells of the cache tables state a run that is there


def test_on_an_h200_all_but_72b_bf16_fit_and_the_run_takes_minutes() -> None:
    h200 = bench(config_of=get_model)
    lost = {(row.run.model, row.run.precision) for row in guide_rows() if not plan_of(h200, row.run).fits}
    assert lost == {("Qwen-72B", "bf16")}
    assert expected_seconds(h200, guide_rows(), 6) < 180


def test_each_row_is_measured_and_equal_runs_once(record: dict[str, Any]) -> None:
    rows = record["rows"]
    assert [row["table"] for row in rows] == [row.table for row in ROWS]
    assert all(row["why"] is None for row in rows)
    for row in rows:
        measured = row["measured"]
        assert measured["generated"] == row["tokens"]
        assert measured["tokens_per_s"] == pytest.approx(row["batch"] * row["tokens"] / measured["seconds"])
        assert measured["bytes_per_s"] == pytest.approx(measured["read_share"] * 1e10)
        assert measured["kv_cache"] == row["plan"]["kv_cache"]
    assert rows[0]["measured"] == rows[4]["measured"]  # one run
    assert rows[2]["measured"]["kv_cache"] > rows[3]["measured"]["kv_cache"]  # 16 bits against 8 and an affine
    assert rows[1]["measured"]["weights"] < rows[0]["measured"]["weights"]
    assert len(record["figures"]) == 4 * 3
    assert json.loads(json.dumps(record)) == record


def test_a_row_is_cut_to_its_seconds_but_for_those_that_must_be_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwenfit.bench.guide_run.LEAST_TOKENS", 4)
    made = run_guide(bench(), ROWS, seconds_per_row=1e-9, tell=lambda text: None)
    assert [row["measured"]["generated"] for row in made["rows"]] == [4, 4, 12, 4, 4]
    page = page_of(made, "guide-x.json")
    assert "4 of 24" in page and "1e-09 s is cut" in page
    assert tokens_for(plan_of(bench(), ROWS[0].run), ROWS[0].run, 1e9) == 24


def test_a_run_that_does_not_fit_says_what_it_needs() -> None:
    small = replace(find_device("H200"), free_bytes=5 * 10**8)
    made = run_guide(bench(device=small), ROWS[:1], tell=lambda text: None)
    assert made["rows"][0]["why"].startswith("does not fit") and made["rows"][0]["measured"] is None
    assert "does not fit" in page_of(made, "x") and made["figures"] == {}


def test_the_failure_of_one_model_is_not_the_others_and_time_can_run_out() -> None:
    def failing(config: ModelConfig, precision: str) -> Transformer:
        if precision == "int4":
            raise RuntimeError("CUDA error: out of luck\nmore")
        return tiny_model(config, precision)

    told: list[str] = []
    made = run_guide(bench(make_model=failing), ROWS, tell=told.append)
    assert made["rows"][1]["why"] == "failed: RuntimeError: CUDA error: out of luck."
    assert [row["measured"] is None for row in made["rows"]] == [False, True, False, False, False]
    assert len(told) == 3
    late = run_guide(bench(), ROWS, deadline=1e-9, tell=lambda text: None)
    assert {row["why"] for row in late["rows"]} == {"left out: 1e-09 s had passed."}


def test_a_failing_engine_loses_its_row_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Transformer.forward

    def out_of_memory(self: Transformer, batch: Any, cache: Any, rows: Any) -> torch.Tensor:
        if cache.dtype == "int8":
            raise torch.OutOfMemoryError
        return forward(self, batch, cache, rows)

    monkeypatch.setattr(Transformer, "forward", out_of_memory)
    made = run_guide(bench(), ROWS, tell=lambda text: None)
    assert [row["measured"] is None for row in made["rows"]] == [False, False, False, True, False]
    assert "out of memory" in made["rows"][3]["why"]


def test_the_page_is_of_the_record_and_says_when_it_is_stale(tmp_path: Path, record: dict[str, Any]) -> None:
    page = tmp_path / "docs" / "measured.md"
    folder = tmp_path / "measurements"
    folder.mkdir()
    assert page_is_fresh(page, folder) and newest_record(folder) is None  # neither record nor page
    assert main([str(page)], folder) == 4 and main(["--check", str(page)], folder) == 0
    options: dict[str, Any] = {"seconds_per_row": None, "deadline": None, "command": "qwenfit bench guide"}
    told: list[str] = []
    made = run_and_write(bench(), ROWS[:2], folder, page, tell=told.append, **options)
    newest = newest_record(folder)
    assert newest is not None and json.loads(newest.read_text()) == made
    text = page.read_text()
    assert page_is_fresh(page, folder) and main(["--check", str(page)], folder) == 0
    assert text == page_of(made, newest.name) and "| 1.8B int4 | 71.07 |" in text and "2 of 2 rows ran" in text
    page.write_text(text.replace("71.07", "71.08"))
    assert main(["--check", str(page)], folder) == 1
    assert main([str(page)], folder) == 0 and page.read_text() == text
    assert main([], folder) == main(["--help"], folder) == 2


def test_a_row_that_ran_out_in_the_guide_is_named_where_it_ran(record: dict[str, Any]) -> None:
    page = page_of(record, "guide-x.json")
    assert "| bf16, 3 x 12 | OOM |" in page
    assert "ran out of memory in the guide, and ran here: bf16 cache x 3" in page


def test_the_records_feed_the_refit(record: dict[str, Any]) -> None:
    steps = list(steps_of(record))
    assert len(steps) == 5 and steps[0].seconds == pytest.approx(1 / record["rows"][0]["measured"]["tokens_per_s"])


@pytest.mark.parametrize(
    ("text", "error"), [("[]", BadFile), ('{"kind": "decode"}', BadFile), ("{", BadFile), (b"\xff", BadFile)]
)
def test_a_file_that_is_no_record_is_refused(tmp_path: Path, text: str | bytes, error: type[QwenfitError]) -> None:
    (tmp_path / "guide-x.json").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(error):
        newest_record(tmp_path)


@pytest.fixture
def run_verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(guide_verb, "gpu_bench", bench)
    monkeypatch.setattr(guide_verb, "guide_rows", lambda: ROWS)
    return lambda model=None, **options: guide_verb.bench_guide(
        model, print, **({"record": tmp_path / "measurements"} | options)
    )


def test_the_verb_writes_record_and_page(run_verb: Callable[..., int], tmp_path: Path) -> None:
    assert run_verb("Qwen-1.8B", out=tmp_path / "new" / "page.md") == 0
    assert (tmp_path / "new" / "page.md").read_text().startswith("# The guide's inference tables, run")
    assert len(list((tmp_path / "measurements").glob("guide-h200-sxm-141gb-*.json"))) == 1
    assert run_verb() == 0 and page_is_fresh(tmp_path / "docs/measured.md", tmp_path / "measurements")


def test_mistakes_are_told_before_anything_runs(run_verb: Callable[..., int], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no inference rows of 'Qwen-9B'"):
        run_verb("Qwen-9B")
    with pytest.raises(UsageError, match="seconds-per-row"):
        run_verb(seconds_per_row=0.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotFound, match="cannot be written"):
        run_verb(out=tmp_path / "file" / "page.md")
    with pytest.raises(NotFound, match="cannot be written"):
        run_verb(record=tmp_path / "file")


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(QwenfitError, match="no CUDA device") as raised:
        guide_verb.bench_guide(None, print, record=tmp_path, out=tmp_path / "page.md")
    assert raised.value.exit_code == 1 and raised.value.hint == "qwenfit doctor"


def test_the_committed_page_is_fresh() -> None:
    assert page_is_fresh(guide_page.REPOSITORY / "docs/measured.md", guide_page.REPOSITORY / "measurements")
