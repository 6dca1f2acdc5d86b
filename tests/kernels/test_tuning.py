"""What a shape takes that was not measured, held against what was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from qwenfit.catalog import dense_model_names, get_model
from qwenfit.errors import BadFile, UsageError
from qwenfit.kernels.triton import tuning

CORES = 132  # of the card that the records are of
SEARCHES = sorted((Path(__file__).parents[2] / "measurements").glob("gpu-search-h200-*.json"))
RECORDS = [record for record in (json.loads(path.read_text()) for path in SEARCHES) if record.get("sequences") == 1]


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_cores", lambda: CORES)


@pytest.mark.parametrize("name", dense_model_names())
def test_a_card_holds_the_programs_that_any_model_takes(name: str) -> None:
    config = get_model(name)
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim
    qkv = heads + 2 * config.num_kv_heads * config.head_dim
    for inputs, outputs in ((hidden, qkv), (heads, hidden), (hidden, 2 * inner), (inner, hidden)):
        for bits in (4, 8):
            rule = tuning._rule("int_matvec", (bits, inputs, outputs, 1))
            assert rule["warps"] * rule["programs"] <= CORES * 16
            held = rule["rows"] * rule["words"] // (32 * rule["warps"])  # words of a thread, and again of its next tile
            assert 8 <= held <= 64
            assert 32 * rule["warps"] * (2 * held + 60) * rule["programs"] // CORES <= 1.5 * 65536


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: f"{record['model']} {record['precision']}")
def test_the_rule_is_about_as_fast_as_what_a_search_found(record: dict[str, Any]) -> None:
    lost = 0.0
    for key, trials in record["trials"].items():
        kernel, *shape = key.split()
        if "matvec" not in kernel:
            continue
        rule = tuning._rule(kernel, tuple(map(int, shape)))
        times = [ms for ms, config in trials["best"] if rule.items() >= config.items() - {("hold", 0)}]
        lost += min(times, default=trials["best"][-1][0]) - trials["best"][0][0]  # at least, where it is not among them
    assert len(RECORDS) >= 25
    assert lost <= 0.10 * record["short_ms"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("QWENFIT_TUNED", str(tmp_path))
    monkeypatch.setattr(tuning, "_card", lambda: "NVIDIA H200")
    tuning._table.cache_clear(), tuning._lookup.cache_clear()
    yield tmp_path
    tuning._table.cache_clear(), tuning._lookup.cache_clear()


def test_what_was_found_on_ones_own_card_comes_before_what_the_package_knows(own: Path) -> None:
    shape, other = (4, 4096, 12288, 1), (4, 4096, 22016, 1)
    found = {"rows": 2, "words": 512, "warps": 4, "programs": 66, "hold": 1}
    kept = tuning.tuned("int_matvec", other)
    tuning._table.cache_clear(), tuning._lookup.cache_clear()
    (own / "gpu-search.json").write_text("{}")  # the record beside it
    for name, card in (("tuned.json", "NVIDIA H200"), ("tuned-2.json", "another")):
        content = {"cards": [card], "configs": {tuning.key("int_matvec", shape): found | {"rows": len(card)}}}
        (own / name).write_text(tuning.as_text(content))
    assert tuning.tuned("int_matvec", shape) == found | {"rows": len("NVIDIA H200")}
    assert tuning.tuned("int_matvec", other) == kept


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"cards": ["NVIDIA H200"], "configs": []}', '{"cards": 1, "configs": {}}', "[" * 100_000,
     '{"cards": ["NVIDIA H200"], "configs": {"a": {"rows": "8"}}}', '{"cards": ["x"], "configs": {"a": 8}}'],
)  # fmt: skip
def test_a_file_that_holds_no_launch_parameters_is_told_of(own: Path, text: str) -> None:
    (own / "tuned.json").write_text(text)
    with pytest.raises(BadFile, match=r"^tuned\.json, "):
        tuning.tuned("int_matvec", (4, 4096, 12288, 1))


def test_a_folder_that_is_none_is_told_of(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (own / "none", own / "tuned.json", "a\0b"):
        (own / "tuned.json").write_text("{}")
        monkeypatch.setattr(tuning.os, "environ", {"QWENFIT_TUNED": str(wrong)})
        tuning._table.cache_clear()
        with pytest.raises(UsageError, match="QWENFIT_TUNED"):
            tuning.tuned("int_matvec", (4, 4096, 12288, 1))
