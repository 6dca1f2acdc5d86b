"""Our network gives the logits and tokens of transformers' Qwen2 and Qwen3: recorded ones, and random tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from model.util import Paged, fill, load_golden, max_error
from safetensors.torch import load_file

from qwenfit.checkpoint.config_json import config_from_dict
from qwenfit.model.rotary import attention_scaling, inverse_frequencies
from qwenfit.model.transformer import Transformer

MODELS = ["qwen2_untied", "qwen2_tied", "qwen2_yarn", "qwen3_untied", "qwen3_tied"]
TOLERANCE = 1e-4


@pytest.mark.parametrize("length", [10, 65, 150])
@pytest.mark.parametrize("name", MODELS)
def test_prefill_logits(golden: Path, name: str, length: int) -> None:
    folder = golden / "qwen2_qwen3" / name
    model, expected = load_golden(folder), load_file(folder / "reference.safetensors")
    ids, rows = expected[f"L{length}.input_ids"].long(), expected[f"L{length}.positions"].long()
    paged = Paged(model, 256)
    logits = paged.run(paged.chunk("s", ids.tolist()))
    assert max_error(logits[rows], expected[f"L{length}.logits"]) < TOLERANCE
    with torch.inference_mode():
        whole = model.logits(model.forward_full(ids[None]))[0]
    assert max_error(whole[rows], expected[f"L{length}.logits"]) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_of_every_layer(golden: Path, name: str) -> None:
    folder = golden / "qwen2_qwen3" / name
    model, expected = load_golden(folder), load_file(folder / "reference.safetensors")
    states: list[torch.Tensor] = []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    model.norm.register_forward_hook(lambda _, args, out: states.append(out))
    paged = Paged(model, 64)
    paged.run(paged.chunk("s", expected["L10.input_ids"].tolist()))
    assert max_error(torch.stack(states), expected["L10.hidden_states"]) < TOLERANCE


@pytest.mark.parametrize("prompt", [20, 70])
@pytest.mark.parametrize("name", MODELS)
def test_decode(golden: Path, name: str, prompt: int) -> None:
    folder = golden / "qwen2_qwen3" / name
    model, expected = load_golden(folder), load_file(folder / "reference.safetensors")
    new_ids = expected[f"P{prompt}.new_ids"].tolist()
    logits = Paged(model, 256).feed("s", expected[f"P{prompt}.input_ids"].tolist(), new_ids)
    assert max_error(logits, expected[f"P{prompt}.logits"]) < TOLERANCE
    assert logits.argmax(-1).tolist() == new_ids


@pytest.mark.parametrize("name", MODELS)
def test_rotary_frequencies(golden: Path, name: str) -> None:
    folder = golden / "qwen2_qwen3" / name
    config = load_golden(folder).config
    expected = load_file(folder / "reference.safetensors")["inv_freq"]
    ours = inverse_frequencies(config.head_dim, config.rope_theta, yarn=config.yarn)
    assert torch.allclose(ours, expected, rtol=1e-6, atol=0)
    scaling = json.loads((folder / "expected.json").read_text())["attention_scaling"]
    assert (attention_scaling(config.yarn) if config.yarn else 1.0) == pytest.approx(scaling, rel=1e-12)


@st.composite
def published_configs(draw: st.DrawFn) -> dict[str, object]:
    """A tiny Qwen2 or Qwen3 config.json with the published keys."""
    family = draw(st.sampled_from(["qwen2", "qwen3"]))
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 4))
    head_dim = 2 * draw(st.integers(2, 20))
    config: dict[str, object] = {
        "model_type": family,
        "architectures": [f"{family.capitalize()}ForCausalLM"],
        "hidden_size": heads * head_dim if family == "qwen2" else 8 * draw(st.integers(1, 12)),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": 8 * draw(st.integers(1, 16)),
        "vocab_size": draw(st.integers(20, 200)),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "rope_theta": draw(st.sampled_from([1e4, 1e6])),
        "tie_word_embeddings": draw(st.booleans()),
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    assume(int(str(config["hidden_size"])) >= 16)  # RMSNorm over 4 numbers blows float32 noise up past the tolerance
    if family == "qwen3":
        config |= {"head_dim": head_dim, "attention_bias": False}
    if draw(st.booleans()):
        scaling = {"type": "yarn", "factor": draw(st.sampled_from([2.0, 4.0]))}
        config["rope_scaling"] = scaling | {"original_max_position_embeddings": draw(st.sampled_from([32, 64, 128]))}
    return config


@settings(max_examples=40, deadline=None)
@given(published=published_configs(), seed=st.integers(0, 2**16), length=st.integers(1, 80), split=st.integers(0, 79))
def test_random_tiny_models_equal_transformers(
    published: dict[str, object], seed: int, length: int, split: int
) -> None:
    """Prefill of a part of the sequence, then one token at a time, against transformers on the whole."""
    transformers = pytest.importorskip("transformers")
    theirs_config = transformers.AutoConfig.for_model(**published)
    theirs_config._attn_implementation = "eager"
    torch.manual_seed(seed)
    theirs = transformers.AutoModelForCausalLM.from_config(theirs_config).eval().float()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            mean = 1.0 if "norm" in name else 0.0
            parameter.normal_(mean, 0.1 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5)
    stored = theirs.state_dict()
    ours = fill(Transformer(config_from_dict(published, name="tiny")), stored)
    ids = torch.randint(0, int(str(published["vocab_size"])), (1, length))
    with torch.inference_mode():
        expected = theirs(ids).logits[0]
    split = max(split % length, 1)
    paged = Paged(ours, 128)
    parts = [ids[0, :split].tolist(), *([token] for token in ids[0, split:].tolist())]
    logits = torch.cat([paged.run(paged.chunk("s", part)) for part in parts])
    assert max_error(logits, expected) < TOLERANCE
