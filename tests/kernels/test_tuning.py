"""What a shape takes that was not measured, held against what was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from qwenfit.bench import gpu_prefill, gpu_search
from qwenfit.catalog import dense_model_names, get_model
from qwenfit.errors import BadFile, UsageError
from qwenfit.kernels.triton import ragged, tuning

CORES = 132  # of the card that the records are of
SEARCHES = sorted((Path(__file__).parents[2] / "measurements").glob("gpu-search-h200-*.json"))
RECORDS = [record for record in (json.loads(path.read_text()) for path in SEARCHES) if record.get("sequences") == 1]

SHAPE, OTHER = (4, 4096, 12288, 1), (4, 4096, 22016, 1)
FOUND = {"rows": 2, "words": 512, "warps": 4, "programs": 66, "hold": 1}
KNOWN = json.loads((Path(tuning.__file__).parent / "tuned/nvidia-h200.json").read_text())["configs"]


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_cores", lambda: CORES)


@pytest.mark.parametrize("name", dense_model_names())
def test_any_model_takes_configs_within_what_a_search_would_try(name: str) -> None:
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


def write(folder: Path, configs: Any, cards: Any = ("NVIDIA H200",)) -> None:
    (folder / "tuned.json").write_text(json.dumps({"cards": cards, "configs": configs}))


def test_what_was_found_on_ones_own_card_comes_before_what_the_package_knows(own: Path) -> None:
    write(own, {tuning.key("int_matvec", SHAPE): FOUND})
    assert tuning.tuned("int_matvec", SHAPE) == FOUND
    assert tuning.tuned("int_matvec", OTHER) == KNOWN[tuning.key("int_matvec", OTHER)]


def test_what_was_found_on_another_card_is_left_alone(own: Path) -> None:
    write(own, {tuning.key("int_matvec", SHAPE): FOUND}, ["NVIDIA H200 NVL"])
    assert tuning.tuned("int_matvec", SHAPE) == KNOWN[tuning.key("int_matvec", SHAPE)]


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"cards": "NVIDIA H200", "configs": {}}', "\ufeff{}"])
def test_a_file_that_holds_no_launch_parameters_is_told_of(own: Path, text: str) -> None:
    (own / "tuned.json").write_text(text)
    with pytest.raises(BadFile, match=r"tuned\.json, which QWENFIT_TUNED names"):
        tuning.tuned("int_matvec", SHAPE)


@pytest.mark.parametrize(
    "wrong",
    [8, [], {}, {"rows": 4}, FOUND | {"rows": 3}, FOUND | {"rows": 0}, FOUND | {"rows": -4}, FOUND | {"words": 2},
     FOUND | {"warps": "4"}, FOUND | {"warps": True}, FOUND | {"programs": 0}, FOUND | {"programs": 1 << 40}],
)  # fmt: skip
def test_numbers_that_make_no_kernel_are_told_of(own: Path, wrong: Any) -> None:
    """A number of programs below 1 would leave the outputs unwritten."""
    write(own, {tuning.key("int_matvec", SHAPE): wrong})
    with pytest.raises(BadFile, match=r"tuned\.json"):
        tuning.tuned("int_matvec", SHAPE)


def test_every_config_that_the_package_has_would_be_read(own: Path) -> None:
    assert len(KNOWN) > 200
    write(own, KNOWN)
    assert tuning.tuned("int_matvec", OTHER) == KNOWN[tuning.key("int_matvec", OTHER)]


def test_a_folder_without_such_a_file_is_told_of(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own / "binary").mkdir()
    (own / "binary" / "tuned.json").write_bytes(b"\xff\xfe")
    for wrong in (own, own / "none", own / "binary", "a\0b"):
        monkeypatch.setattr(tuning.os, "environ", {"QWENFIT_TUNED": str(wrong)})
        tuning._table.cache_clear()
        with pytest.raises(UsageError, match="QWENFIT_TUNED names"):
            tuning.tuned("int_matvec", SHAPE)


def test_searches_of_several_models_are_kept_in_one_file(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_search.torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    for shape in (SHAPE, OTHER):
        gpu_search.keep(own / "tuned.json", {tuning.key("int_matvec", shape): FOUND | {"programs": shape[2]}})
    assert [tuning.tuned("int_matvec", shape)["programs"] for shape in (SHAPE, OTHER)] == [SHAPE[2], OTHER[2]]
    monkeypatch.setattr(gpu_search.torch.cuda, "get_device_name", lambda: "another")
    gpu_search.keep(own / "tuned.json", {})
    assert json.loads((own / "tuned.json").read_text()) == {"cards": ["another"], "configs": {}}


ATTENTION = json.loads((SEARCHES[0].parent / "gpu-search-attention-h200.json").read_text())["runs"]


@pytest.mark.parametrize("run", ATTENTION, ids=lambda run: f"{run['model']} {run['kv_cache']} x {run['sequences']}")
def test_attention_of_several_takes_about_what_a_search_found(run: dict[str, Any]) -> None:
    """Of the time of a step of a few layers."""
    for key, trials in run["trials"].items():
        kernel, *shape = key.split()
        rule = {"stages": 1} | tuning._rule(kernel, tuple(map(int, shape)))
        (took,) = (ms for ms, config in trials["best"] if {"stages": 1} | config == rule)
        assert took <= 1.02 * trials["best"][0][0]


@pytest.mark.parametrize(
    ("name", "missing", "count", "bound"), [("h200-2", "no NVRTC", 20, 1.01), ("h200-3", "", 54, 1.1)]
)
def test_attention_of_prompts_takes_about_the_fastest_that_was_measured(
    monkeypatch: pytest.MonkeyPatch, name: str, missing: str, count: int, bound: float
) -> None:
    """With the kernel in CUDA C++, and where it is missing."""
    file = SEARCHES[0].parent / f"gpu-prompt-attention-{name}.json"
    record = json.loads(file.read_text())["attention"]["rows"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(ragged, "why_not", lambda *_: missing)
    rows = [row for row in record if "ours" in row]
    for row in rows:
        config = ragged._fastest(torch.device("cuda"), torch.bfloat16, tuple(row["shape"]), row["length"])
        took = row["ours"][gpu_prefill.CONFIGS.index(config)]
        assert took <= (1 if row["length"] >= 1024 and not missing else bound) * min(row["ours"]), row
        assert took < row["flash"]
    assert len(rows) == count


@pytest.mark.parametrize(("dtype", "missing"), [(torch.float16, ""), (torch.bfloat16, "no NVRTC")])
def test_a_tuned_kernel_of_prompts_is_for_those_that_have_it(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, missing: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(ragged, "measured", lambda *_: ragged.HOPPER_LONG)
    monkeypatch.setattr(ragged, "why_not", lambda *_: missing)
    device = torch.device("cuda")
    assert ragged._fastest(device, dtype, (32, 32, 128), 2048) == ragged.HOPPER
    monkeypatch.setattr(ragged, "why_not", lambda *_: "")
    assert ragged._fastest(device, torch.bfloat16, (32, 32, 128), 2048) == ragged.HOPPER_LONG
