"""Exact bytes: the published checkpoints, the cache, the adapters. Every figure is worked out here by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qwenfit.catalog import dense_model_names, get_model, read_csv
from qwenfit.config import ModelConfig, Quantization
from qwenfit.errors import UsageError
from qwenfit.planning.finetune_memory import lora_parameters
from qwenfit.planning.inference_memory import cached_tokens, kv_bytes_per_token
from qwenfit.planning.planner import plan
from qwenfit.planning.stack import get_stack
from qwenfit.planning.task import Inference
from qwenfit.planning.weights import (
    check_tensor_parallel,
    split_layers,
    tensor_parallel_bytes,
    weight_bytes,
    with_head,
)

OLD = "transformers-4.3x"
ROWS = [row for row in read_csv("models.csv") if not row["num_experts"]]


def test_qwen_72b_in_bf16_is_as_large_as_its_safetensors_index_says() -> None:
    assert weight_bytes(get_model("Qwen-72B"), "bf16", OLD).total == 144_575_840_256


def linears(row: dict[str, str]) -> list[tuple[int, int, bool]]:
    """(in, out, has a bias) of one block's stored linear layers, from the catalog row alone."""
    h, heads, kv, d, m = (
        int(row[key]) for key in ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
    )
    bias = row["qkv_bias"] == "yes"
    qkv = [(h, 3 * heads * d, bias)] if row["family"] == "Qwen" else [(h, n * d, bias) for n in (heads, kv, kv)]
    return [*qkv, (heads * d, h, False), (h, m, False), (h, m, False), (m, h, False)]


def small(row: dict[str, str]) -> tuple[int, int]:
    """(elements of norms in one block, elements of embedding, head and final norm)."""
    h, tables = int(row["hidden_size"]), 1 if row["tied_embeddings"] == "true" else 2
    norms = 2 * h + (2 * int(row["head_dim"]) if row["qk_norm"] == "yes" else 0)
    return norms, tables * int(row["vocab_size"]) * h + h


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model"])
def test_bf16_bytes_are_two_per_parameter_of_the_catalog(row: dict[str, str]) -> None:
    norms, outside = small(row)
    block = sum(i * o + (o if bias else 0) for i, o, bias in linears(row)) + norms
    by_hand = int(row["num_layers"]) * block + outside
    assert by_hand == int(row["params_computed"])
    for stack in (OLD, "transformers-5", "vllm", "qwenfit"):
        assert weight_bytes(get_model(row["model"]), "bf16", stack).total == 2 * by_hand


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model"])
def test_gptq_bytes_are_those_of_the_files_that_autogptq_writes(row: dict[str, str], bits: int) -> None:
    norms, outside = small(row)
    block = 2 * norms
    for n_in, n_out, _ in linears(row):
        groups = -(-n_in // 128)
        block += n_in * bits // 32 * n_out * 4  # qweight, int32, packed along the inputs
        block += groups * (n_out * bits // 32) * 4  # qzeros, int32, packed along the outputs
        block += groups * n_out * 2  # scales, float16
        block += n_in * 4  # g_idx, int32
        block += n_out * 2  # a bias for every layer, also where the model has none
    by_hand = int(row["num_layers"]) * block + 2 * outside
    assert weight_bytes(get_model(row["model"]), f"int{bits}", OLD).total == by_hand


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["model"])
def test_a_token_leaves_two_vectors_per_layer_and_kv_head(row: dict[str, str]) -> None:
    config = get_model(row["model"])
    elements = 2 * int(row["num_layers"]) * int(row["num_kv_heads"]) * int(row["head_dim"])
    vectors = 2 * int(row["num_layers"]) * int(row["num_kv_heads"])
    assert int(row["kv_bytes_per_token_bf16"]) == 2 * elements
    for cache, bytes_ in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        assert kv_bytes_per_token(config, cache, get_stack("qwenfit")) == bytes_ * elements
    assert kv_bytes_per_token(config, "int8", get_stack(OLD)) == elements + 4 * vectors  # 16-bit scale and zero
    assert kv_bytes_per_token(config, "int8", get_stack("qwenfit")) == elements + 8 * vectors  # float32 ones
    assert kv_bytes_per_token(config, "int8", get_stack("vllm")) == elements  # fp8


def test_the_official_int8_cache_is_51_6_percent_of_the_bf16_one() -> None:
    config, stack = get_model("Qwen-7B"), get_stack(OLD)
    ratio = kv_bytes_per_token(config, "int8", stack) / kv_bytes_per_token(config, "bf16", stack)
    assert ratio == pytest.approx(0.516, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "millions"), [("Qwen-1.8B", 53.7), ("Qwen-7B", 143.1), ("Qwen-14B", 223.2), ("Qwen-72B", 755)]
)
def test_lora_of_rank_64_has_as_many_parameters_as_the_official_script_trains(name: str, millions: float) -> None:
    assert lora_parameters(get_model(name), 64) / 1e6 == pytest.approx(millions, rel=1e-3)


def test_ntk_alpha_is_that_of_the_original_code(golden: Path) -> None:
    rows = json.loads((golden / "tables/tables.json").read_text())["ntk_alpha"]
    assert len(rows) > 20
    for training_length, prompt, alpha in rows:
        config = _with_training_length(get_model("Qwen-7B"), training_length)
        assert config.ntk_alpha(prompt) == alpha, (training_length, prompt)


def _with_training_length(config: ModelConfig, length: int) -> ModelConfig:
    from dataclasses import replace

    return replace(config, training_length=length)


def test_past_8192_tokens_qwen_7b_has_alpha_3_and_qwen_72b_none() -> None:
    assert [get_model("Qwen-7B").ntk_alpha(n) for n in (8192, 8193, 16385)] == [1, 3, 7]
    assert get_model("Qwen-72B").ntk_alpha(32768) == 1


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_tensor_parallel_never_cuts_a_group(precision: str) -> None:
    allowed = {
        name: [n for n in (2, 4, 8) if _splits(name, n, precision)]
        for name in ("Qwen-1.8B", "Qwen-7B", "Qwen-14B", "Qwen-72B")
    }
    assert allowed == {"Qwen-1.8B": [], "Qwen-7B": [2], "Qwen-14B": [], "Qwen-72B": [2, 4, 8]}


def test_16_bit_tensor_parallel_needs_only_heads_and_widths_that_divide() -> None:
    assert [n for n in (2, 4, 8, 16) if _splits("Qwen-1.8B", n, "bf16")] == [2, 4, 8, 16]
    assert [n for n in (2, 3, 4, 5, 8) if _splits("Qwen-14B", n, "bf16")] == [2, 4, 8]
    assert not _splits("Qwen2.5-0.5B", 4, "bf16")  # 14 heads
    assert not _splits("Qwen2.5-7B", 8, "bf16")  # 28 heads


def _splits(name: str, devices: int, precision: str) -> bool:
    try:
        check_tensor_parallel(get_model(name), devices, precision)
    except UsageError as error:
        assert error.message.endswith(".")
        return False
    return True


@pytest.mark.parametrize("name", dense_model_names())
def test_tensor_parallel_keeps_every_byte_somewhere(name: str) -> None:
    config = get_model(name)
    weights = weight_bytes(config, "bf16", "vllm")
    for devices in (2, 4, 8):
        each = tensor_parallel_bytes(config, weights, devices)
        assert weights.total / devices <= each < weights.total


def test_layers_are_split_as_evenly_as_they_go() -> None:
    assert split_layers(80, 8) == [10] * 8
    assert split_layers(32, 3) == [11, 11, 10]


def test_a_paged_cache_keeps_a_shared_prefix_once() -> None:
    task = Inference(prompt=1024, generate=512, batch=8, shared_prefix=512)
    assert cached_tokens(task, get_stack("qwenfit")) == 512 + 8 * 1024
    assert cached_tokens(task, get_stack(OLD)) == 8 * 1536


def test_a_quantized_head_replaces_the_16_bit_one_and_a_tied_embedding_stays() -> None:
    for name, tied in (("Qwen-7B", False), ("Qwen2.5-0.5B", True)):
        config = get_model(name)
        plain = weight_bytes(config, "int4", "qwenfit")
        quantized = with_head(config, plain, "int4")
        rows, width = config.vocab_size, config.hidden_size
        head = rows * width // 2 + rows * (width // 128) * 2  # 4 bits, and a 16-bit scale per group
        assert quantized.head == head and quantized.embedding == plain.embedding == 2 * rows * width
        assert quantized.total == plain.total + head - (0 if tied else 2 * rows * width)
        assert quantized.read_per_token < plain.read_per_token


QUANTIZED = [
    Quantization("gptq", 4, 128),
    Quantization("gptq", 4, 32),
    Quantization("gptq", 4, -1, desc_act=True),
    Quantization("gptq", 8, 64, desc_act=True, sym=False),
    Quantization("gptq", 8, 128, sym=False),
    Quantization("awq", 4, 128, sym=False),
    Quantization("awq", 4, 64, sym=False),
]


@pytest.mark.parametrize("quantization", QUANTIZED, ids=str)
@pytest.mark.parametrize("on_cpu", [True, False], ids=["cpu", "gpu"])
def test_a_quantized_checkpoint_takes_the_bytes_that_its_packed_layers_have(
    quantization: Quantization, on_cpu: bool
) -> None:
    """Its own groups, the zeros of AWQ and of asymmetric GPTQ, the order of act-order: as the kernels lay them out."""
    import torch

    from qwenfit.kernels.packed import pack
    from qwenfit.kernels.triton.int_matvec import pack_blocked
    from qwenfit.quantize.types import QuantizedWeight

    small = replace(get_model("Qwen2.5-0.5B"), hidden_size=256, num_heads=4, num_kv_heads=2, intermediate_size=512)
    config = replace(small, quantization=quantization)
    bits, held = quantization.bits, 0
    for shape in config.layer_linears():
        n_in, n_out = shape.in_features, shape.out_features
        group = n_in if quantization.group_size == -1 else quantization.group_size
        codes = torch.zeros(n_out, n_in, dtype=torch.uint8)
        zeros = torch.full((n_out, n_in // group), float(2 ** (bits - 1) if quantization.sym else 3))
        order = torch.randperm(n_in) if quantization.desc_act and group < n_in else None
        weight = QuantizedWeight(bits, group, codes, torch.ones(n_out, n_in // group).half(), zeros.half(), order)
        packed = pack(weight, torch.bfloat16) if on_cpu else pack_blocked(weight, torch.bfloat16, "cpu")
        assert packed is not None
        held += packed.nbytes + (2 * n_out if shape.bias else 0)
    assert weight_bytes(config, f"int{bits}", "qwenfit", on_cpu).layer == held + 2 * 2 * config.hidden_size


def test_vllm_keeps_a_checkpoints_groups_and_the_packed_zeros_of_awq() -> None:
    model = get_model("Qwen2.5-7B")
    plain = weight_bytes(replace(model, quantization=Quantization("gptq", 4, 128)), "int4", "vllm").total
    linear = model.num_layers * model.linear_parameters_per_layer
    awq = weight_bytes(replace(model, quantization=Quantization("awq", 4, 128, sym=False)), "int4", "vllm").total
    assert awq - plain == linear // 128 // 2
    fine = weight_bytes(replace(model, quantization=Quantization("gptq", 4, 32)), "int4", "vllm").total
    assert fine - plain == 2 * (linear // 32 - linear // 128)


def test_integers_are_not_rounded_to_other_integers() -> None:
    for model, precision in (("Qwen-7B-Chat-Int4", "int8"), ("Qwen-72B-Chat-Int8", "int4")):
        with pytest.raises(UsageError, match="round a second time"):
            plan(model, gpu="H100", precision=precision)
    assert plan("Qwen-7B-Chat-Int4", gpu="H100", precision="bf16", advise=False).precision == "bf16"
    for advice in plan("Qwen-72B-Chat-Int8", gpu="RTX 3090").advice:
        assert "int4" not in advice.what
