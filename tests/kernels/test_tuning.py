"""What a shape takes that was not measured, held against what was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from qwenfit.catalog import dense_model_names, get_model
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
