"""Constants of training that records of known constants were made with are found again from the records."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qwenfit.bench.refit_tune import Cell, cell_of, fit, main, table
from qwenfit.planning.finetune_qwenfit import FITTED
from qwenfit.planning.task import Finetune

CELLS = [
    Cell(model, "H200-SXM-141GB", "bf16", Finetune(method=method, seq_len=length, grad_accum=8), 1.0, 1.0)
    for model, method, length in (
        ("Qwen-7B", "lora", 256), ("Qwen-7B", "lora", 1024), ("Qwen-7B", "lora", 4096), ("Qwen-7B", "lora", 8192),
        ("Qwen-1.8B", "lora", 256), ("Qwen-1.8B", "full", 256),
    )
]  # fmt: skip


def test_a_slower_host_and_slower_products_are_found(monkeypatch):
    truth = {"train_product_share": 0.6, "train_host": 8e-3, "train_host_adapters": 3e-3}
    with monkeypatch.context() as patch:
        for name, value in truth.items():
            patch.setitem(FITTED, name, replace(FITTED[name], value=value))
        cells = [replace(cell, seconds=cell.planned_seconds()) for cell in CELLS]
    before = dict(FITTED)
    found = fit(cells)
    assert before == FITTED
    assert found["train_product_share"] == pytest.approx(0.6, rel=0.1)  # what attention does not take, products do
    for name, value in found.items():
        monkeypatch.setitem(FITTED, name, replace(FITTED[name], value=value))
    assert all(cell.planned_seconds() == pytest.approx(cell.seconds, rel=0.02) for cell in cells)
    assert found["train_host"] == pytest.approx(8e-3, rel=0.03)
    assert found["train_host"] + found["train_host_adapters"] == pytest.approx(11e-3, rel=0.03)
    fitted = dict(FITTED)
    assert len(table(cells, found)) == len(cells) and fitted == FITTED


def test_records_of_a_gpu_are_read_and_those_of_a_cpu_left_out(tmp_path, capsys):
    record = {
        "kind": "tune", "model": "Qwen-7B", "device": "H200-SXM-141GB", "precision": "bf16",
        "plan": {"task": {"lora_rank": 64}}, "measured": {"seconds_per_iter": 3.2, "allocated": 17.8},
        "facts": {"device": "cuda", "cell": {"method": "lora", "seq_len": 4096, "micro_batch": 1, "grad_accum": 8,
                                             "optimizer": "fp32", "keep": "inputs"}},
    }  # fmt: skip
    assert cell_of(record).task.seq_len == 4096
    paths = []
    for name, device in (("a", "cuda"), ("b", "cpu")):
        paths.append(tmp_path / name)
        paths[-1].write_text(json.dumps(record | {"facts": record["facts"] | {"device": device}}))
    assert main([str(path) for path in paths]) == 0
    out = capsys.readouterr().out
    assert out.count("Qwen-7B lora bf16 4096") == 1 and "train_host_adapters" in out
    assert main([]) == 2
