"""Inference on a CPU with AMX is planned at what the engine reached there: measurements/*-intel-*.json, two cores."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qwenfit.catalog import get_model
from qwenfit.hardware import Device, Hardware, find_device
from qwenfit.kernels import choice, native
from qwenfit.planning.device_speed import cpu_read_share
from qwenfit.planning.inference_speed import (
    FEW_ROWS,
    ONEDNN_ROWS,
    ROWS_AT_ONCE,
    inference_speed,
    prefill_seconds,
)
from qwenfit.planning.stack import get_stack
from qwenfit.planning.task import Inference
from qwenfit.planning.types import Speed

FOLDER = Path(__file__).parents[2] / "measurements"
RECORDS = sorted(FOLDER.glob("decode-intel-*.json")) + sorted(FOLDER.glob("prefill-intel-*.json"))
EPYC = sorted(FOLDER.glob("decode-amd-epyc-*-2026-11-30*.json"))
ZEN3, ZEN5 = (
    [path for path in EPYC if json.loads(path.read_text())["plan"]["hardware"]["source"].startswith(f"EPYC {series}")]
    for series in (7003, 9005)
)
OWN = get_stack("qwenfit")


def cores(name: str, count: int, bandwidth: float) -> Device:
    device = find_device(f"{name} 64GB")
    flops = {dtype: peak / device.units * count for dtype, peak in device.flops.items()}
    return replace(device, units=count, flops=flops, bandwidth=bandwidth, detected=True)


def planned(record: dict[str, Any]) -> Speed:
    facts, known = record["facts"], record["plan"]["hardware"]["source"][:9] if record["device"] == "AMD EPYC" else ""
    name, features = known or "Xeon Emerald Rapids", () if known == "EPYC 7003" else ("avx512f",)
    device = replace(cores(name, facts["threads"], facts["limits"]["read"]), features=features)
    task = Inference(prompt=facts["prompt"], generate=facts["generate"], batch=facts["batch"])
    return inference_speed(get_model(record["model"]), Hardware(device), task, record["precision"], OWN, "none")


def ratio(record: dict[str, Any]) -> float:
    """How much faster the plan is than the run."""
    speed, figures = planned(record), record["figures"]
    if record["kind"] == "decode":
        return speed.tokens_per_s_per_request / figures["decode_tokens_per_s"]["measured"]
    return figures["time_to_first_token"]["measured"] / speed.time_to_first_token


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_recorded_run_is_within_what_such_a_guest_varies(path: Path) -> None:
    """Prompts, one request and many: the same run took up to twice as long at other times."""
    assert 0.6 < ratio(json.loads(path.read_text())) < 1.8


def test_the_recorded_runs_are_met_in_the_middle() -> None:
    ratios = sorted(ratio(json.loads(path.read_text())) for path in RECORDS)
    assert len(ratios) >= 20
    assert 0.85 < ratios[len(ratios) // 2] < 1.25


def test_decoding_on_zen_5_is_planned_at_what_two_of_its_cores_reached() -> None:
    """Of 0.5B to 14B; a gap between layers that fits slower cores too makes the plan of the smallest the slowest."""
    ratios = sorted(ratio(json.loads(path.read_text())) for path in ZEN5)
    assert len(ratios) >= 12 and 0.9 < ratios[len(ratios) // 2] < 1.1
    assert ratios[0] > 0.7 and ratios[-1] < 1.2


def test_decoding_on_zen_3_is_planned_at_what_two_of_its_cores_reached() -> None:
    """Of 0.5B to 7B in a noisy hour, in which the plain read beside them was measured at 21 to 26 GB/s."""
    ratios = sorted(ratio(json.loads(path.read_text())) for path in ZEN3)
    assert len(ratios) >= 20 and 0.9 < ratios[len(ratios) // 2] < 1.1
    assert ratios[0] > 0.75 and ratios[-1] < 1.25


def test_a_prompt_reads_and_multiplies_one_after_the_other() -> None:
    """Tiles multiply so fast that neither reading nor unpacking hides behind them; every 512 rows cost them again."""
    two, model = Hardware(cores("Xeon Emerald Rapids", 2, 17e9)), get_model("Qwen-1.8B")
    seconds = {n: prefill_seconds(model, two, n, "int4", OWN, "none")[0] for n in (1, 4, 5, 64, 128, 512, 513)}
    assert seconds[4] == seconds[1] < seconds[5]  # the matrix-vector kernels
    per_token = (seconds[128] - seconds[64]) / 64
    assert seconds[64] - 64 * per_token > seconds[1]  # what does not grow with the prompt
    assert seconds[513] - seconds[512] > 0.9 * (seconds[5] - 5 * per_token)
    zen = Hardware(cores("EPYC 7003", 2, 17e9))
    assert prefill_seconds(model, zen, 2, "int4", OWN, "none") == prefill_seconds(model, zen, 1, "int4", OWN, "none")


@pytest.mark.parametrize("name", ["Xeon Emerald Rapids", "EPYC 9004", "EPYC 7003"])
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_more_requests_share_a_step_and_each_is_slower(name: str, precision: str) -> None:
    hardware, model = Hardware(cores(name, 2, 17e9)), get_model("Qwen2.5-0.5B")
    each = [
        inference_speed(model, hardware, Inference(prompt=16, generate=32, batch=n), precision, OWN, "none")
        for n in (1, 2, 4, 8, 32)
    ]
    alone = [speed.tokens_per_s_per_request for speed in each]
    assert all(more < 1.05 * fewer for fewer, more in pairwise(alone))
    assert alone[-1] < 0.7 * alone[0] and each[-1].tokens_per_s > 1.5 * each[0].tokens_per_s


def test_the_plan_knows_the_rows_at_which_the_engine_changes_kernels() -> None:
    source = (Path(native.__file__).parent / "tiles.c").read_text()
    assert (FEW_ROWS, ONEDNN_ROWS) == (native.GEMV_ROWS, choice._ONEDNN_ROWS)
    assert f"#define MOST_ROWS {ROWS_AT_ONCE} " in source


def test_other_software_has_no_tiles_of_ours() -> None:
    hardware, task = Hardware(cores("Xeon Emerald Rapids", 2, 17e9)), Inference(prompt=512, generate=1)
    model, stack = get_model("Qwen2.5-0.5B"), get_stack("transformers-5")
    speed = inference_speed(model, hardware, task, "bf16", stack, "none")
    assert speed.time_to_first_token_interval.high == pytest.approx(speed.time_to_first_token * (1 + stack.speed_error))


def test_no_plan_reads_more_than_a_whole_sockets_channels() -> None:
    for name in ("Xeon Sapphire Rapids", "Xeon Emerald Rapids", "Xeon 6 Granite Rapids"):
        assert cpu_read_share(find_device(f"{name} 256GB"), OWN) < 1 < cpu_read_share(cores(name, 2, 17e9), OWN)
    shares = [cpu_read_share(cores("Xeon Emerald Rapids", 2, 2 * each), OWN) for each in (5e9, 6e9, 6.1e9, 7e9, 9e9)]
    assert shares == sorted(shares) and shares[2] - shares[1] < 0.03
    estimated = replace(cores("Xeon Emerald Rapids", 16, 160e9), bandwidth_estimated=True)
    assert cpu_read_share(estimated, OWN) < 1
    assert cpu_read_share(cores("Xeon Emerald Rapids", 2, 17e9), get_stack("transformers-5")) < 1
