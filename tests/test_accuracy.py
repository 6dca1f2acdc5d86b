"""The accuracy that the project promises, the constants behind it, and the page that says so."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from qwenfit.catalog import get_model, model_names
from qwenfit.errors import BadFile
from qwenfit.guide.accuracy import MOST_FITTED, Evidence, accuracy_is_fresh, accuracy_markdown, evidence, main
from qwenfit.guide.cells import guide_cells, readme_cells
from qwenfit.guide.records import measurement_rows
from qwenfit.hardware import Hardware, find_device
from qwenfit.planning.constants import FITTED, MEASURED, READ
from qwenfit.planning.finetune_qwenfit import FITTED as TRAINER
from qwenfit.planning.inference_speed import inference_speed
from qwenfit.planning.stack import STACKS, get_stack
from qwenfit.planning.task import Inference

PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"
TARGETS = [  # what, n, median, worst
    ("inference memory", 12, 0.015, 0.05),
    ("KV cache memory", 19, 0.03, 0.08),
    ("finetuning memory", 42, 0.04, 0.10),
    ("README finetuning memory, 14B and 72B", 30, 0.06, 0.15),
    ("inference tokens/s", 13, 0.08, 0.20),
    ("finetuning s/iter", 42, 0.12, 0.30),
]


def named(what: str) -> Evidence:
    return next(part for part in evidence() if part.what.startswith(what))


@pytest.mark.parametrize(("what", "count", "median", "worst"), TARGETS)
def test_accuracy_targets_are_reached(what: str, count: int, median: float, worst: float) -> None:
    part = named(what)
    assert len(part.errors) == count
    assert part.median <= median
    assert part.worst <= worst
    assert (part.median_target, part.worst_target, part.reached) == (median, worst, True)


def test_finetuning_of_14b_and_72b_is_held_out() -> None:
    part = named("README finetuning memory, 14B and 72B")
    assert not part.calibrated
    assert {cell.model for cell in part.cells} == {"Qwen-14B", "Qwen-72B"}
    calibrated = {cell.model for cell in named("finetuning memory").cells}
    assert calibrated == {"Qwen-1.8B", "Qwen-7B"}


def test_at_most_ten_constants_are_fitted_and_each_says_what_it_is() -> None:
    assert len(FITTED) <= MOST_FITTED == 10
    for name, constant in FITTED.items():
        assert constant.name == name
        assert constant.unit and constant.meaning and constant.data
        assert not [model for model in model_names() if model.lower() in name.lower()]


def predictions() -> list[float]:
    """Every figure that the plan is held against: the guide's, the README's, and vLLM's on an H100."""
    cells = [*guide_cells(), *readme_cells()]
    h100 = Hardware(find_device("H100-SXM5-80GB"))
    vllm = [
        inference_speed(get_model(model), h100, Inference(1, 2048), "bf16", get_stack("vllm"), "single").tokens_per_s
        for model in ("Qwen-7B", "Qwen-1.8B")
    ]
    return [c.prediction for c in cells if isinstance(c.prediction, float)] + vllm


@pytest.mark.parametrize("name", FITTED)
def test_no_fitted_constant_belongs_to_a_single_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before, old = predictions(), FITTED[name].value
    monkeypatch.setitem(FITTED, name, replace(FITTED[name], value=2 * old))
    for stack in list(STACKS.values()):
        own = {f.name: 2 * old for f in fields(stack) if getattr(stack, f.name) == old}
        monkeypatch.setitem(STACKS, stack.name, replace(stack, **own))
    changed = [after for after, first in zip(predictions(), before, strict=True) if after != first]
    assert len(set(changed)) >= 2


def test_the_accuracy_page_is_fresh() -> None:
    assert accuracy_is_fresh(PAGE), "stale: python -m qwenfit.guide.accuracy docs/accuracy.md"


def test_the_page_lists_every_constant_and_every_cell() -> None:
    text = accuracy_markdown()
    assert all(f"| `{name}` |" in text for name in (*FITTED, *READ, *MEASURED, *TRAINER))
    listed = text.split("## Cell by cell")[1]
    assert listed.count("\n| Qwen-") == sum(len(part.cells) for part in evidence())
    assert "**no**" not in text


def test_the_check_fails_on_a_stale_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "accuracy.md"
    assert main(["--check", str(page)]) == 1
    assert main([str(page)]) == 0
    assert main(["--check", str(page)]) == 0
    page.write_text(page.read_text().replace("yes", "no", 1))
    assert main(["--check", str(page)]) == 1
    assert "is stale" in capsys.readouterr().err
    assert main([]) == main(["--help"]) == 2  # and no file of that name


def test_records_of_real_runs_join_the_page(tmp_path: Path) -> None:
    assert "no record" in accuracy_markdown(tmp_path)
    figures = {
        "process": {"unit": "GB", "planned": 1.0, "measured": 2.0},
        "decode_tokens_per_s": {"unit": "tokens/s each", "planned": 90.0, "measured": 100.0},
        "unaccounted": {"unit": "GB", "planned": None, "measured": 0.5},
    }
    (tmp_path / "run.json").write_text(json.dumps({"figures": figures}))
    (tmp_path / "other.json").write_text(json.dumps({"versions": {}}))
    rows = [(row.record, row.figure, row.plan, row.measured, row.error) for row in measurement_rows(tmp_path)]
    assert rows == [
        ("run", "process, GB", 1.0, 2.0, -0.5),
        ("run", "decode tokens per s, tokens/s each", 90.0, 100.0, pytest.approx(-0.1)),
    ]
    assert "| run | decode tokens per s, tokens/s each | 90.00 | 100.0 | -10.0 % |" in accuracy_markdown(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", "\x00"])
def test_a_broken_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(BadFile, match=r"run\.json"):
        measurement_rows(tmp_path)
