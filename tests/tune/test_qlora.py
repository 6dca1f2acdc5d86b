"""Q-LoRA: gradients through int4 and int8 weights are those of their dequantised values."""

from __future__ import annotations

import pytest
import torch
from tune.tiny import losses_of, network, save_hf, settings, source

from qwenfit.checkpoint.load import load_model
from qwenfit.errors import UsageError
from qwenfit.kernels.packed import dequantize, pack
from qwenfit.quantize.rtn import quantize_rtn
from qwenfit.tune.adapters import LoRA, add_lora, lora_layers, merge_into, trained_parameters
from qwenfit.tune.merge import merge
from qwenfit.tune.peft_format import load_adapter, write_adapter
from qwenfit.tune.quantized import frozen_quantized_linear


@pytest.mark.parametrize("bits", [4, 8])
def test_forward_and_backward_are_those_of_the_dequantised_weight(bits):
    generator = torch.Generator().manual_seed(bits)
    packed = pack(quantize_rtn(torch.randn(48, 128, generator=generator), bits, 64), torch.float32)
    weight = dequantize(packed)
    x = torch.randn(5, 128, generator=generator, requires_grad=True)
    bias = torch.randn(48, generator=generator)
    up = torch.randn(5, 48, generator=generator)
    out = frozen_quantized_linear(x, packed, bias)
    out.backward(up)
    torch.testing.assert_close(out, x @ weight.T + bias)
    torch.testing.assert_close(x.grad, up @ weight)


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_the_losses_are_those_of_lora_on_the_dequantised_model(tmp_path, precision):
    base = save_hf(tmp_path / "base")
    quantized = load_model(base, precision=precision, dtype=torch.float32)[0]
    plain = network(base)
    with torch.no_grad():
        for name, module in quantized.named_modules():
            if getattr(module, "packed", None) is not None:
                plain.get_submodule(name).weight.copy_(dequantize(module.packed))
    curves = []
    for model in (quantized, plain):
        torch.manual_seed(3)
        add_lora(model, LoRA(4, 8.0, 0.0))
        assert all("lora_" in name for name in trained_parameters(model))
        curves.append(losses_of(model, settings(base), source()))
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-5
    assert curves[0][-1] < curves[0][0]


def test_the_adapter_runs_beside_int4_weights_and_merges_onto_the_16_bit_base_only(tmp_path):
    base = save_hf(tmp_path / "base")
    model = load_model(base, precision="int4", dtype=torch.float32)[0]
    lora = LoRA(4, 8.0, 0.0)
    add_lora(model, lora)
    losses_of(model, settings(base, max_steps=5), source())
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", model, lora, str(base), {"precision": "int4"})
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted = model.eval().logits(model.forward_full(ids))
        beside = load_model(base, precision="int4", dtype=torch.float32)[0]
        load_adapter(beside, beside.config, tmp_path / "adapter")
        assert lora_layers(beside)
        torch.testing.assert_close(beside.logits(beside.forward_full(ids)), wanted, rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="int4 or int8"):
        merge_into(beside)
    report = merge(tmp_path / "adapter", tmp_path / "merged")
    assert "Q-LoRA" in report.text and "int4" in report.text
