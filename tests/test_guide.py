"""The guide's cells: what is flagged and why, what passes, and how it is shown."""

import io
import json
import subprocess
import sys
import time

import pytest
from rich.console import Console

from qwenfit.catalog import read_csv
from qwenfit.errors import UsageError
from qwenfit.guide import finetune_claims, inference_claims
from qwenfit.guide.cards import named_cards
from qwenfit.guide.cells import TOLERANCE, guide_cells, guide_json, readme_cells
from qwenfit.guide.render import cells_of, print_guide
from qwenfit.guide.types import AGREES, DIFFERS, IMPOSSIBLE, MEMORY, NO_WORD, OOM, S_PER_ITER, WORDS, Cell


def pick(table: str, quantity: str, *words: str, model: str = "") -> list[Cell]:
    """The guide's cells of a table and quantity whose row has all the words."""
    return [
        c
        for c in guide_cells()
        if c.table == table and c.quantity == quantity and model in c.model and all(word in c.where for word in words)
    ]


def printed(width: int, table: str | None = None) -> str:
    file = io.StringIO()
    print_guide(Console(file=file, width=width), table)
    return file.getvalue()


@pytest.mark.parametrize("table", ["inference", "kv_cache_batch", "kv_cache_length", "finetune", "requirements"])
def test_every_memory_figure_of_a_table_has_a_cell(table: str) -> None:
    column = "inference_memory_gb" if table == "requirements" else "memory_gb"
    stated = [row[column] for row in read_csv(f"guide/{table}.csv") if row[column]]
    cells = [f"{c.guide:g}" if isinstance(c.guide, float) else c.guide for c in guide_cells() if c.table == table]
    for figure in stated:
        cells.remove(figure if figure == OOM else f"{float(figure):g}")


def test_every_speed_of_the_guide_has_a_cell() -> None:
    speeds = [float(row["tokens_per_s"]) for row in read_csv("guide/inference.csv")]
    assert [c.guide for c in pick("inference", "tokens/s")] == speeds
    seconds = [float(row["s_per_iter"]) for row in read_csv("guide/finetune.csv")]
    assert [c.guide for c in pick("finetune", S_PER_ITER)] == seconds


@pytest.mark.parametrize("table", ["requirements", "deployment"])
def test_every_card_that_the_guide_names_has_a_cell(table: str) -> None:
    columns = ("minimum_gpu", "recommended_gpu", "recommended_configuration")
    texts = [row[column] for row in read_csv(f"guide/{table}.csv") for column in columns if row.get(column)]
    named = [cards.text for text in texts for cards in named_cards(text)]
    assert sorted(named) == sorted(c.guide for c in guide_cells() if c.table == table and c.quantity.endswith("GPU"))


def test_cards_are_read_as_the_guide_writes_them() -> None:
    found = named_cards("single RTX 3090/4090 (bf16) or RTX 3070 (int4)")
    expected = [("RTX 3090", 1, "bf16"), ("RTX 4090", 1, "bf16"), ("RTX 3070", 1, "int4")]
    assert [(c.device.name, c.count, c.precision) for c in found] == expected
    found = named_cards("2x A100 80GB or 4x A100 40GB")
    assert [(c.device.name, c.count, c.text) for c in found] == [
        ("A100-SXM4-80GB", 2, "2x A100 80GB"),
        ("A100-SXM4-40GB", 4, "4x A100 40GB"),
    ]
    assert [c.device.name for c in named_cards("RTX 3060 12GB or better")] == ["RTX 3060 12GB"]


def test_words_are_agrees_differs_and_impossible_and_facts_have_none() -> None:
    cells = guide_cells()
    assert {c.word for c in cells} == set(WORDS) == {AGREES, DIFFERS, IMPOSSIBLE, NO_WORD}
    assert {c.quantity for c in cells if c.word == NO_WORD} == {"release date", "pretraining tokens"}
    for cell in cells:
        if cell.word in (DIFFERS, IMPOSSIBLE):
            assert cell.reason
        if cell.word == AGREES and cell.error is not None and cell.guide != OOM:
            assert abs(cell.error) <= TOLERANCE[cell.quantity]


@pytest.mark.parametrize("quantity", [MEMORY, S_PER_ITER])
def test_the_42_cells_that_the_readme_confirms_agree(quantity: str) -> None:
    confirmed = [c for c in pick("finetune", quantity) if c.confirmed]
    assert len(confirmed) == 42
    assert {c.word for c in confirmed} == {AGREES}
    assert all(c.official is None for c in confirmed)


def test_full_parameter_runs_on_two_cards_are_impossible_by_their_states() -> None:
    seven = pick("finetune", MEMORY, "Full-parameter, 2 GPUs", model="Qwen-7B")
    fourteen = pick("finetune", MEMORY, "Full-parameter, 2 GPUs", model="Qwen-14B")
    assert len(seven) == len(fourteen) == 3
    assert all(
        c.word == IMPOSSIBLE and "16 bytes for each of 7.72e9 parameters over 2 cards" in c.reason for c in seven
    )
    assert all(c.word == IMPOSSIBLE and "states alone take 113.3 GB on each card" in c.reason for c in fourteen)
    assert [c.official for c in seven] == [69.6, 74.0, 81.0]  # sums of 139.2, 148.0 and 162.0 over two cards


def test_qlora_of_72b_contradicts_itself_and_the_smaller_figure_is_impossible() -> None:
    small = pick("finetune", MEMORY, "Q-LoRA (Int4), 256", model="Qwen-72B")[0]
    assert (small.guide, small.official, small.word) == (50.4, 61.4, IMPOSSIBLE)
    assert "int4 weights" in small.reason and "the guide says 61.4 in models and requirements" in small.reason
    for table in ("models", "requirements"):
        (large,) = pick(table, MEMORY, "Q-LoRA", model="Qwen-72B")
        assert (large.guide, large.word, large.reason) == (61.4, AGREES, "the guide says 50.4 in finetune")


def test_only_the_batch_4_cell_breaks_the_line_of_the_kv_cache_tables() -> None:
    cells = [c for c in guide_cells() if c.table.startswith("kv_cache")]
    (flagged,) = [c for c in cells if c.word != AGREES]
    assert (flagged.guide, flagged.word) == (24.1, IMPOSSIBLE)
    assert flagged.reason == "above 19.4, the line from batch 1 (16.3) to batch 16 (31.7)"


def test_oom_cells_do_not_fit_and_cells_that_ran_do() -> None:
    cells = [*guide_cells(), *readme_cells()]
    oom = [c for c in cells if c.guide == OOM]
    assert len(oom) == 2
    assert all(c.fits is False and c.word == AGREES for c in oom)
    ran = [c for c in cells if isinstance(c.guide, float) and c.word != IMPOSSIBLE]
    assert len(ran) > 250
    assert all(c.fits for c in ran)


def test_a_card_smaller_than_the_guides_own_figure_is_impossible() -> None:
    flagged = {
        (c.model, c.where, c.guide) for c in guide_cells() if c.quantity.endswith("GPU") and c.word == IMPOSSIBLE
    }
    assert flagged == {("Qwen-7B", "int4", "RTX 3070"), ("Qwen-7B", "int8", "RTX 3080")}


def test_times_below_what_flops_or_links_take_are_impossible() -> None:
    cells = pick("finetune", S_PER_ITER, "ZeRO 3", model="Qwen-72B")
    assert [c.word for c in cells] == [IMPOSSIBLE] * 3
    assert "ZeRO-3 receives" in cells[0].reason
    assert "FLOPs at the card's peak" in cells[2].reason


def test_no_row_of_the_official_readme_is_impossible() -> None:
    cells = readme_cells()
    assert len(cells) == 2 * len(read_csv("guide/readme_finetune.csv"))
    assert not [c for c in cells if c.word == IMPOSSIBLE]


def changed(name: str, column: str, new: str, **row: str):
    """`read_csv` with one column of the rows that match `row` changed."""

    def reader(asked: str):
        rows = read_csv(asked)
        if asked != name:
            return rows
        return tuple(r | {column: new} if row.items() <= r.items() else r for r in rows)

    return reader


def test_flags_follow_the_figures_not_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"model": "Qwen-72B", "method": "Q-LoRA (Int4)", "seq_len": "256"}
    monkeypatch.setattr(finetune_claims, "read_csv", changed("guide/finetune.csv", "memory_gb", "61.4", **row))
    assert pick("finetune", MEMORY, "Q-LoRA (Int4), 256")[0].word == AGREES
    row = {"batch": "4", "kv_cache_int8": "no"}
    reader = changed("guide/kv_cache_batch.csv", "memory_gb", "18.4", **row)
    monkeypatch.setattr(inference_claims, "read_csv", reader)
    assert {c.word for c in pick("kv_cache_batch", MEMORY)} == {AGREES}


@pytest.mark.parametrize(
    ("module", "name", "column", "new", "row", "law"),
    [
        (finetune_claims, "finetune", "memory_gb", "16", {"model": "Qwen-7B", "method": "LoRA"}, "bf16 weights (15.4"),
        (
            finetune_claims,
            "finetune",
            "memory_gb",
            "90",
            {"model": "Qwen-1.8B", "method": "LoRA"},
            "above the 80.0 GiB",
        ),
        (finetune_claims, "finetune", "s_per_iter", "0.9", {"model": "Qwen-7B", "seq_len": "2048"}, "TFLOP/s"),
        (
            finetune_claims,
            "finetune",
            "memory_gb",
            "20.9",
            {"method": "LoRA", "seq_len": "8192"},
            "less than at tokens 4",
        ),
        (inference_claims, "inference", "memory_gb", "14.9", {"model": "Qwen-7B", "precision": "bf16"}, "one KV cache"),
        (inference_claims, "inference", "tokens_per_s", "140", {"model": "Qwen-7B", "precision": "bf16"}, "bandwidth"),
        (
            inference_claims,
            "kv_cache_length",
            "memory_gb",
            "21.5",
            {"generated_tokens": "4096"},
            "the line from tokens",
        ),
    ],
)
def test_each_bound_flags_a_figure_that_breaks_it(
    monkeypatch: pytest.MonkeyPatch, module, name: str, column: str, new: str, row: dict[str, str], law: str
) -> None:
    assert not [c for c in guide_cells() if law in c.reason and c.guide == float(new)]
    monkeypatch.setattr(module, "read_csv", changed(f"guide/{name}.csv", column, new, **row))
    flagged = [c for c in guide_cells() if law in c.reason and c.guide == float(new)]
    assert flagged and all(c.word == IMPOSSIBLE for c in flagged)


def test_guide_json_is_plain_data_with_the_counts_of_its_words() -> None:
    data = json.loads(json.dumps(guide_json(cells_of(None)), allow_nan=False))
    assert len(data["cells"]) == len(guide_cells())
    assert {cell["table"] for cell in guide_json(cells_of("finetune"))["cells"]} == {"finetune"}
    assert data["counts"][IMPOSSIBLE] == sum(cell["word"] == IMPOSSIBLE for cell in data["cells"])


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_printed_guide_is_plain_and_stays_within_its_width_in_a_pipe(width: int) -> None:
    text = printed(width)
    assert "\x1b" not in text and text.isascii()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= max(width, 100)
    lines = text.splitlines()
    for words in (("24.10", "impossible"), ("50.40", "61.40", "impossible"), ("RTX 3070", "impossible")):
        assert any(all(word in line for word in words) for line in lines), words
    shown = [line for line in lines if line.startswith("Qwen-")]
    assert len(shown) == len(guide_cells())


def test_one_table_is_printed_alone_and_an_unknown_one_is_refused() -> None:
    text = printed(100, "kv_cache_batch")
    assert "24.1" in text and "Q-LoRA" not in text
    assert "139.2" not in printed(100, "readme") and "69.60" in printed(100, "readme")
    with pytest.raises(UsageError) as caught:
        printed(100, "finetunes")
    assert "finetune" in str(caught.value.hint)


@pytest.mark.timing
def test_the_guide_is_judged_within_a_second_and_without_torch() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        guide_cells()
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1
    code = "import sys; from qwenfit.guide.cells import *; guide_cells(); print({'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
