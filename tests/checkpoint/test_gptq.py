"""GPTQ and AWQ layers: what AutoGPTQ's packers stored comes out exactly."""

import json

import pytest
import torch
from models import greedy, prompt_logits, read_model, write_model
from safetensors.torch import load_file

from qwenfit.checkpoint.gptq import concatenate, unpack_awq, unpack_gptq
from qwenfit.checkpoint.load import load_model
from qwenfit.config import Quantization
from qwenfit.errors import BadFile, UsageError
from qwenfit.quantize.types import QuantizedWeight

LAYERS = [
    "in256_out64_int4_g128",
    "in256_out64_int4_g128_asym",
    "in256_out64_int4_gall",
    "in256_out192_int8_g128",
    "in256_out64_int8_g128_actorder",
    "in384_out192_int4_g128",
    "in384_out192_int4_g128_actorder",
    "in384_out64_int8_g128",
]
PACKED = ("qweight", "qzeros", "scales", "g_idx")


def golden_layer(golden, name):
    row = next(r for r in json.loads((golden / "gptq/gptq.json").read_text())["layers"] if name in r["file"].split("."))
    stored = load_file(golden / "gptq" / row["file"])
    return stored, Quantization("gptq", row["bits"], row["group_size"], row["desc_act"], row["sym"])


def pack_rows(values, bits):
    """[n, columns] -> int32 [n * bits / 32, columns], lowest bits first, in plain Python integers."""
    per = 32 // bits
    rows = []
    for start in range(0, values.shape[0], per):
        words = sum(values[start + i].long() << (bits * i) for i in range(per))
        rows.append(torch.where(words >= 2**31, words - 2**32, words).int())
    return torch.stack(rows)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_exact(golden, name):
    stored, quantization = golden_layer(golden, name)
    got = unpack_gptq(name, {part: stored[part] for part in PACKED}, quantization)
    columns = torch.arange(got.in_features) if got.perm is None else got.perm
    assert torch.equal(got.q, stored["int_weight"].t()[:, columns])
    assert torch.equal(got.zeros, stored["int_zero"].t().to(got.zeros.dtype))
    assert torch.equal(got.dequantize(), stored["weight"].t())
    assert (got.perm is not None) == quantization.desc_act


@pytest.mark.parametrize("name", [n for n in LAYERS if "actorder" in n])
def test_act_order_is_a_permutation_of_the_input(golden, name):
    stored, quantization = golden_layer(golden, name)
    got = unpack_gptq(name, {part: stored[part] for part in PACKED}, quantization)
    x = stored["x"].float()
    in_order = QuantizedWeight(got.bits, got.group_size, got.q, got.scales, got.zeros).dequantize()
    assert torch.allclose(x[:, got.perm] @ in_order.t(), stored["y"], atol=1e-4)


@pytest.mark.parametrize("name", ["in256_out64_int4_g128", "in256_out192_int8_g128"])
def test_a_symmetric_layer_tells_the_zero_point_convention_by_value(golden, name):
    """Stored 8 (128) is the newer convention: the same layer as stored 7 (127), whatever the config says."""
    stored, quantization = golden_layer(golden, name)
    middle = 2 ** (quantization.bits - 1)
    newer = pack_rows(torch.full_like(stored["int_zero"].t(), middle), quantization.bits).t().contiguous()
    assert not torch.equal(newer, stored["qzeros"])
    got = unpack_gptq(name, {**{p: stored[p] for p in PACKED}, "qzeros": newer}, quantization)
    assert torch.equal(got.dequantize(), stored["weight"].t())


def test_an_asymmetric_layer_goes_by_the_declared_format(golden):
    stored, _ = golden_layer(golden, "in256_out64_int4_g128_asym")
    true = pack_rows(stored["int_zero"].t(), 4).t().contiguous()
    declared = Quantization("gptq", 4, 128, sym=False, checkpoint_format="gptq_v2")
    got = unpack_gptq("layer", {**{p: stored[p] for p in PACKED}, "qzeros": true}, declared)
    assert torch.equal(got.dequantize(), stored["weight"].t())


def test_a_zero_point_of_none_wraps_around():
    """A true zero of 0 is stored as -1 in 4 bits, 15: adding the one back must not give 16."""
    quantization = Quantization("gptq", 4, 8, sym=False)
    q = torch.arange(64).reshape(8, 8) % 16  # [in, out]
    stored = {
        "qweight": pack_rows(q, 4),
        "qzeros": torch.tensor([[-1]], dtype=torch.int32),  # eight times 15
        "scales": torch.ones(1, 8, dtype=torch.float16),
        "g_idx": torch.zeros(8, dtype=torch.int32),
    }
    assert torch.equal(unpack_gptq("layer", stored, quantization).dequantize(), q.t().float())


def test_a_layer_that_is_not_symmetric_as_declared_is_refused(golden):
    stored, _ = golden_layer(golden, "in256_out64_int4_g128_asym")
    with pytest.raises(BadFile, match=r"h\.0\.mlp\.w1\.qzeros holds zero points 4 to 9"):
        unpack_gptq("h.0.mlp.w1", {p: stored[p] for p in PACKED}, Quantization("gptq", 4, 128))


@pytest.mark.parametrize("g_idx", [[0] * 129 + [1] * 127, [0] * 128 + [5] * 128, [-1] * 256])
def test_groups_of_other_sizes_are_refused(golden, g_idx):
    stored, quantization = golden_layer(golden, "in256_out64_int4_g128")
    stored["g_idx"] = torch.tensor(g_idx, dtype=torch.int32)
    with pytest.raises(BadFile, match=r"w1\.g_idx does not divide its 256 inputs into groups of 128"):
        unpack_gptq("w1", {p: stored[p] for p in PACKED}, quantization)


def test_parts_with_one_act_order_fuse_and_others_are_refused(golden):
    stored, quantization = golden_layer(golden, "in384_out192_int4_g128_actorder")
    part = unpack_gptq("q_proj", {p: stored[p] for p in PACKED}, quantization)
    fused = concatenate("qkv_proj", [part, part])
    assert torch.equal(fused.dequantize(), torch.cat([stored["weight"].t()] * 2))
    other = QuantizedWeight(part.bits, part.group_size, part.q, part.scales, part.zeros, part.perm.flip(0))
    for parts in ([part, other], [QuantizedWeight(4, 128, part.q, part.scales, part.zeros), part]):
        with pytest.raises(BadFile, match="different act-order"):
            concatenate("qkv_proj", parts)


def test_awq_layer_is_exact():
    """AutoAWQ's gemm packing: of eight outputs, nibble i holds the one numbered 0 2 4 6 1 3 5 7 [i]; zeros alike."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randint(0, 16, (256, 16), generator=generator)  # [in, out]
    zeros = torch.randint(0, 16, (2, 16), generator=generator)
    scales = torch.rand(2, 16, generator=generator).half()
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])

    def pack(values):
        shuffled = values.reshape(values.shape[0], -1, 8)[..., order].flatten(1)
        return pack_rows(shuffled.t(), 4).t().contiguous()

    quantization = Quantization("awq", 4, 128, sym=False)
    got = unpack_awq({"qweight": pack(q), "qzeros": pack(zeros), "scales": scales}, quantization)
    expected = (q - zeros.repeat_interleave(128, 0)).float() * scales.float().repeat_interleave(128, 0)
    assert torch.equal(got.dequantize(), expected.t())


@pytest.mark.parametrize("name", ["int4", "int8"])
class TestWholeModel:
    """The released Int4 and Int8 layout of Qwen-1, against float32 logits with the dequantised weights."""

    def test_dequantised_logits(self, golden, name):
        folder = golden / "qwen1_gptq" / name
        model, _ = load_model(folder, precision="fp32")
        reference = load_file(folder / "reference.safetensors")
        for prompt in {key.partition(".")[0] for key in reference if key.startswith("L")}:
            got = prompt_logits(model, reference[f"{prompt}.input_ids"], reference[f"{prompt}.positions"])
            assert (got - reference[f"{prompt}.logits"]).abs().max() < 1e-4, prompt

    def test_packed_tokens(self, golden, name):
        folder = golden / "qwen1_gptq" / name
        model, config = load_model(folder, dtype=torch.float32)
        assert config.quantization.bits == int(name[-1])
        assert all(layer.mlp.down_proj.packed.bits == config.quantization.bits for layer in model.layers)
        reference = load_file(folder / "reference.safetensors")
        for prompt in {key.partition(".")[0] for key in reference if key.startswith("P")}:
            new = reference[f"{prompt}.new_ids"].tolist()
            assert greedy(model, reference[f"{prompt}.input_ids"], len(new))[0] == new

    def test_other_bits_are_refused(self, golden, name):
        other = "int4" if name == "int8" else "int8"
        with pytest.raises(UsageError, match="round a second time"):
            load_model(golden / "qwen1_gptq" / name, precision=other)

    def test_a_nonzero_bias_where_there_is_none(self, golden, tmp_path, name):
        config, tensors = read_model(golden / "qwen1_gptq" / name)
        tensors["transformer.h.1.mlp.w1.bias"][3] = 0.5
        folder = write_model(tmp_path / "m", config, tensors)
        with pytest.raises(BadFile, match=r"nonzero transformer\.h\.1\.mlp\.w1\.bias"):
            load_model(folder)

    def test_files_without_the_zero_biases_load_the_same(self, golden, tmp_path, name):
        config, tensors = read_model(golden / "qwen1_gptq" / name)
        kept = {k: v for k, v in tensors.items() if not k.endswith(".bias") or "c_attn" in k}
        assert len(kept) < len(tensors)
        lean = load_model(write_model(tmp_path / "m", config, kept), precision="fp32")[0].state_dict()
        full = load_model(golden / "qwen1_gptq" / name, precision="fp32")[0].state_dict()
        assert all(torch.equal(lean[key], full[key]) for key in full)
