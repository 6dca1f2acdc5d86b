"""Loading: golden models give the golden logits, whatever the file layout, the precision and the names."""

from dataclasses import replace

import pytest
import torch
from models import greedy, prompt_logits, qwen2_config, qwen2_tensors, read_model, write_model
from safetensors.torch import load_file

from qwenfit.catalog import get_model
from qwenfit.checkpoint.load import load_model, state_dict
from qwenfit.checkpoint.resolve import resolve_model
from qwenfit.errors import NotFound, UsageError
from qwenfit.kernels import native
from qwenfit.kernels.linear import dequantize
from qwenfit.model.linear import Linear
from qwenfit.quantize.rtn import quantize_rtn

GOLDEN_MODELS = {
    "qwen1/a_ntk_logn": ("prefill", "L65"),
    "qwen1/b_plain_base1e6": ("prefill", "L100"),
    "qwen2_qwen3/qwen2_untied": ("reference", "L65"),
    "qwen2_qwen3/qwen2_tied": ("reference", "L65"),
    "qwen2_qwen3/qwen3_untied": ("reference", "L65"),
    "qwen2_qwen3/qwen3_tied": ("reference", "L65"),
}


def positions_of(reference, prompt):
    return reference.get(f"{prompt}.positions", torch.arange(len(reference[f"{prompt}.input_ids"])))


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_golden_model_gives_the_golden_logits(golden, name):
    model, config = load_model(golden / name, precision="fp32")
    file, prompt = GOLDEN_MODELS[name]
    reference = load_file(golden / name / f"{file}.safetensors")
    got = prompt_logits(model, reference[f"{prompt}.input_ids"], positions_of(reference, prompt))
    assert config.name == name.rpartition("/")[2]
    assert (got - reference[f"{prompt}.logits"]).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["qwen1/a_ntk_logn", "qwen2_qwen3/qwen3_tied"])
def test_shards_load_as_one_file_does(golden, tmp_path, name):
    folder = write_model(tmp_path / "sharded", *read_model(golden / name), shards=3)
    one = load_model(golden / name, precision="fp32")[0].state_dict()
    sharded = load_model(folder, precision="fp32")[0].state_dict()
    assert one.keys() == sharded.keys()
    assert all(torch.equal(one[key], sharded[key]) for key in one)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_any_float_type_is_converted_to_any_other(tmp_path, stored, precision):
    tensors = qwen2_tensors(qwen2_config(), stored)
    model, _ = load_model(write_model(tmp_path / "m", qwen2_config(), tensors), precision=precision)
    wanted = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    state = model.state_dict()
    assert {t.dtype for t in state.values()} == {wanted}
    fused = torch.cat([tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(state["layers.1.self_attn.qkv_proj.weight"], fused.to(wanted))
    gate_up = torch.cat([tensors[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(state["layers.0.mlp.gate_up_proj.weight"], gate_up.to(wanted))
    assert not any(p.is_meta or p.requires_grad for p in model.parameters())


def test_without_a_precision_weights_keep_their_type(tmp_path):
    config = qwen2_config(torch_dtype="float16")
    model, _ = load_model(write_model(tmp_path / "m", config, qwen2_tensors(config, torch.float16)))
    assert model.dtype == torch.float16


@pytest.mark.parametrize(("precision", "bits"), [("int8", 8), ("int4", 4)])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compiled", [True, False], ids=["round.c", "torch"])
def test_weights_rounded_while_loading_are_those_rounded_whole(
    tmp_path, monkeypatch, compiled, stored, precision, bits
):
    """Rounding some rows at a time, q, k and v apart, equals rounding the fused matrix at once."""
    monkeypatch.setattr("qwenfit.checkpoint.load.ROUNDED_AT_ONCE", 256 * 50)  # 48 or 50 rows: off the seams
    if compiled and native.why_not():
        pytest.skip(native.why_not())
    if not compiled:
        monkeypatch.setattr("qwenfit.kernels.rounding.usable", lambda *_: False)
    tensors = qwen2_tensors(config := qwen2_config(), stored)
    model, _ = load_model(write_model(tmp_path / "m", config, tensors), precision=precision, dtype=torch.bfloat16)
    for module, parts in (("self_attn.qkv_proj", ("q", "k", "v")), ("mlp.down_proj", ("down",))):
        published = module.split(".")[0]
        fused = torch.cat([tensors[f"model.layers.0.{published}.{part}_proj.weight"] for part in parts])
        packed = model.get_submodule(f"layers.0.{module}").packed
        assert packed.bits == bits
        assert torch.equal(dequantize(packed), quantize_rtn(fused, bits, 128).dequantize())


def test_a_nan_stays_one_when_it_is_rounded(tmp_path):
    tensors = qwen2_tensors(config := qwen2_config())
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    model, _ = load_model(write_model(tmp_path / "m", config, tensors), precision="int8")
    assert dequantize(model.layers[1].mlp.gate_up_proj.packed).isnan().any()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("precision", "head"), [("int8", None), ("int8", "int8"), ("int4", None), ("int4", "int4")])
def test_a_quantized_model_computes_with_the_rounded_weights(tmp_path, tied, precision, head):
    """Its logits are those of a float32 model whose layer linears (and head) were rounded and dequantised."""
    config = qwen2_config(tie_word_embeddings=tied)
    folder = write_model(tmp_path / "m", config, qwen2_tensors(config, torch.float32))
    reference, _ = load_model(folder, precision="fp32")
    if head and tied:  # the embedding itself stays plain
        reference.lm_head = Linear.from_weight(reference.embed_tokens.weight.clone())
    for name, parameter in reference.named_parameters():
        if name.endswith("_proj.weight") or (head and name == "lm_head.weight"):
            parameter.data = quantize_rtn(parameter, 8 if precision == "int8" else 4, 128).dequantize()
    model, _ = load_model(folder, precision=precision, dtype=torch.float32, head_precision=head)
    ids = torch.arange(40) * 7 % 320
    expected, got = prompt_logits(reference, ids, range(40)), prompt_logits(model, ids, range(40))
    assert (got - expected).abs().max() < 1e-3
    assert (model.lm_head is not None and model.lm_head.packed is not None) == (head is not None)
    assert torch.equal(model.embed_tokens.weight, reference.embed_tokens.weight)


def test_a_stored_copy_of_a_tied_head_is_accepted_when_equal(golden, tmp_path):
    config, tensors = read_model(golden / "qwen2_qwen3/qwen2_tied")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    model, _ = load_model(write_model(tmp_path / "m", config, tensors), precision="fp32")
    assert model.lm_head is None


def test_progress_counts_the_bytes_of_the_file(tmp_path):
    seen = []
    folder = write_model(tmp_path / "m", qwen2_config(), tensors := qwen2_tensors(qwen2_config()))
    load_model(folder, progress=lambda done, total: seen.append((done, total)))
    total = sum(t.nbytes for t in tensors.values())
    assert seen[-1] == (total, total) and seen == sorted(seen) and len(seen) > 10


@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
def test_random_weights_are_finite_deterministic_and_never_zero(precision):
    def load(seed):
        return load_model(config, precision=precision, dtype=torch.bfloat16, random_weights=True, seed=seed)[0]

    config = replace(get_model("Qwen2.5-0.5B"), num_layers=3, vocab_size=2048)
    ids = torch.arange(30) * 11 % 2048
    first, again, other = (prompt_logits(load(seed), ids, range(30)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.isfinite().all() and 0.3 < first.std() < 3
    model = load(0)
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0, name
        assert (parameter == 0).float().mean() < 0.01, name


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"precision": "int3"}, "int3"),
        ({"precision": "fp32", "dtype": torch.bfloat16}, "contradict"),
        ({"head_precision": "bf16"}, "bf16"),
    ],
)
def test_contradictory_precisions_are_usage_errors(golden, arguments, word):
    with pytest.raises(UsageError, match=word):
        load_model(golden / "qwen1/c_ntk", **arguments)


def test_a_catalog_name_without_weights_names_the_way_out(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NotFound) as caught:
        load_model("Qwen-7B")
    assert "qwenfit pull" in caught.value.hint and "qwenfit bench decode" in caught.value.hint


def test_state_dict_has_the_canonical_names(golden):
    folder = golden / "qwen1/d_logn"
    state = state_dict(resolve_model(folder), torch.float32)
    assert torch.equal(state["embed_tokens.weight"], load_file(folder / "model.safetensors")["transformer.wte.weight"])
    assert state.keys() == load_model(folder, precision="fp32")[0].state_dict().keys()


def test_greedy_tokens_of_a_golden_model(golden):
    model, _ = load_model(golden / "qwen1/a_ntk_logn", precision="fp32")
    reference = load_file(golden / "qwen1/a_ntk_logn/decode.safetensors")
    tokens, _ = greedy(model, reference["P60.input_ids"], 40)
    assert tokens == reference["P60.new_ids"].tolist()
