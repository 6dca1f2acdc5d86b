"""Finetuning on CPUs is planned at what torch's own operations reach there, not at the peak of the instructions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwenfit.catalog import get_model
from qwenfit.checkpoint.load import load_model
from qwenfit.config import ModelConfig
from qwenfit.hardware import Device, cpu_names, find_device
from qwenfit.planning.device_speed import matmul_flops
from qwenfit.planning.finetune_cpu import cpu_seconds, dropped_elements, product_flops
from qwenfit.planning.planner import plan
from qwenfit.planning.task import Finetune
from qwenfit.tune.adapters import LoRA, add_lora
from qwenfit.tune.batch import TrainBatch
from qwenfit.tune.forward import batch_loss


def cores(name: str, count: int) -> Device:
    device = find_device(f"{name} 64GB")
    flops = {dtype: peak / device.units * count for dtype, peak in device.flops.items()}
    return replace(device, units=count, flops=flops, bandwidth=count * 10e9)


def test_torch_multiplies_bf16_far_below_the_peak_of_amx() -> None:
    two = cores("Xeon Emerald Rapids", 2)
    assert two.flops["bf16"] == pytest.approx(10.6e12, rel=0.01)
    assert matmul_flops(two, "bf16") == pytest.approx(1.94e12, rel=0.05)  # 2048^3 by torch 2.13, both cores quiet
    assert matmul_flops(two, "fp32") == pytest.approx(0.27e12, rel=0.1)  # the same: 0.25 to 0.29


@pytest.mark.parametrize("name", cpu_names())
def test_no_cpu_trains_in_bf16_faster_than_torchs_product_of_its_type(name: str) -> None:
    device = cores(name, 2)
    assert product_flops(device, "fp32") < matmul_flops(device, "fp32")
    assert product_flops(device, "bf16") < matmul_flops(device, "bf16")
    assert product_flops(device, "int4") == product_flops(device, "bf16")


def test_bf16_is_slower_than_float32_where_torch_has_a_plain_loop_for_it() -> None:
    zen3 = cores("EPYC 7003", 2)
    assert product_flops(zen3, "bf16") == pytest.approx(2 * 7e9, rel=0.5)  # 6 to 8 GFLOP/s a core
    assert product_flops(cores("Xeon Ice Lake", 2), "bf16") == product_flops(cores("Xeon Ice Lake", 2), "fp32")
    narrow, wide = (
        sum(cpu_seconds(get_model("Qwen2.5-0.5B"), Finetune("lora"), zen3, p, 1e12)) for p in ("bf16", "fp32")
    )
    assert narrow > 3 * wide


def test_a_step_has_no_term_of_a_gpu() -> None:
    made = plan("Qwen2.5-0.5B", Finetune("full"), gpu=cores("Xeon Emerald Rapids", 2))
    assert made.speed.terms["host"] == made.speed.terms["link"] == 0
    products = sum(made.speed.terms.values())
    assert made.speed.seconds_per_iter - products > 494e6 * 12e-9  # type: ignore[operator]  # a draw for each weight


@pytest.mark.parametrize("keep", ["inputs", "all"])
def test_dropout_draws_as_many_numbers_as_planned(monkeypatch: pytest.MonkeyPatch, keep: str) -> None:
    tiny = replace(
        get_model("Qwen2.5-0.5B"), vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2,
        num_heads=4, num_kv_heads=2, head_dim=8,
    )  # fmt: skip
    assert isinstance(tiny, ModelConfig)
    model = load_model(tiny, precision="fp32", random_weights=True)[0]
    add_lora(model, LoRA(4, 8.0, 0.5))
    drawn = [0]

    def counted(x: torch.Tensor, probability: float, training: bool) -> torch.Tensor:
        drawn[0] += x.numel() * (training and probability > 0)
        return torch.dropout(x, probability, training)

    monkeypatch.setattr("qwenfit.tune.adapters.dropout", counted)
    ids = torch.randint(0, 64, (1, 8))
    batch = TrainBatch(ids, ids.clone(), torch.arange(8)[None], None, ["random"])
    batch_loss(model.train(), batch, 8, keep=keep).backward()
    task = Finetune("lora", seq_len=8, checkpointing=keep != "all")
    assert drawn[0] == dropped_elements(tiny, task)
