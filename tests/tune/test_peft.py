"""Adapters go to PEFT and back with equal logits, and merge into a model with the same logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tune.tiny import TARGETS, VOCAB, hf_model, losses_of, network, save_hf, settings, source

from qwenfit.checkpoint.load import load_model
from qwenfit.errors import BadFile, NotFound, UsageError
from qwenfit.model.transformer import Transformer
from qwenfit.tune.adapters import LoRA, add_lora, lora_layers, train_rows, train_tables
from qwenfit.tune.forward import hidden_states
from qwenfit.tune.merge import merge
from qwenfit.tune.peft_format import load_adapter, read_adapter, write_adapter

IDS = torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(5))
KINDS = [("qwen2", False), ("qwen2", True), ("qwen3", False), ("qwen3", True)]


def logits_of(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.eval().forward_full(IDS))


def theirs(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def trained(base: Path, folder: Path, what: str = "lora", **changes) -> Transformer:
    """A network a few steps into training, its adapter written to `folder`."""
    model = network(base)
    config = settings(base, max_steps=5, **changes)
    lora = LoRA(config.lora_rank, config.lora_alpha, 0.0)
    add_lora(model, lora)
    if what == "lora-emb":
        train_tables(model)
    if what == "rows":
        train_rows(model, [3, 7, 300])
    losses_of(model, config, source())
    folder.mkdir()
    write_adapter(folder, model, lora, str(base), {"precision": "fp32"})
    return model


@pytest.mark.parametrize("what", ["lora", "lora-emb", "rows"])
@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_our_adapter_has_the_same_logits_in_peft(tmp_path, kind, tied, what):
    peft = pytest.importorskip("peft")
    base = save_hf(tmp_path / "base", kind=kind, tied=tied)
    ours = logits_of(trained(base, tmp_path / "adapter", what))
    loaded = peft.PeftModel.from_pretrained(hf_model(kind, tied), tmp_path / "adapter")
    assert (ours - logits_of(network(base))).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs(loaded), rtol=0, atol=1e-4)


@pytest.mark.parametrize("what", ["lora", "lora-emb", "rows", "q and v", "rslora"])
@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_a_peft_adapter_has_the_same_logits_here(tmp_path, kind, tied, what):
    peft = pytest.importorskip("peft")
    base = save_hf(tmp_path / "base", kind=kind, tied=tied)
    options = {
        "lora-emb": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": tied},
        "rows": {"trainable_token_indices": {"embed_tokens": [3, 7]}},
        "rslora": {"use_rslora": True},
    }.get(what, {})
    targets = ["q_proj", "v_proj"] if what == "q and v" else TARGETS
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False, **options)
    model = peft.get_peft_model(hf_model(kind, tied), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "adapter")
    for merged in (True, False):
        here = network(base)
        load_adapter(here, here.config, tmp_path / "adapter", merge=merged)
        assert bool(lora_layers(here)) != merged
        torch.testing.assert_close(logits_of(here), theirs(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("what", ["lora", "lora-emb", "rows"])
@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_the_merged_folder_has_the_adapters_logits(tmp_path, kind, tied, what):
    transformers = pytest.importorskip("transformers")
    base = save_hf(tmp_path / "base", kind=kind, tied=tied)
    ours = logits_of(trained(base, tmp_path / "adapter", what))
    (base / "tokenizer.json").write_text("{}")
    report = merge(tmp_path / "adapter", tmp_path / "merged")
    assert report.dtype == "float32" and report.adapted == 8 and not report.note
    torch.testing.assert_close(logits_of(network(tmp_path / "merged")), ours, rtol=0, atol=1e-4)
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    (tmp_path / "merged" / "tokenizer.json").unlink()
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(theirs(there), ours, rtol=0, atol=1e-4)


def test_qwen1_adapters_have_the_official_scripts_names(tmp_path, golden):
    base = tmp_path / "base"
    shutil.copytree(golden / "qwen1" / "b_plain_base1e6", base)
    for left in ("batch", "decode", "kv_int8", "prefill"):
        (base / f"{left}.safetensors").unlink(missing_ok=True)
    model = load_model(base, precision="fp32")[0]
    vocab = model.config.vocab_size
    lora = LoRA(4, 8.0, 0.0)
    add_lora(model, lora)
    for layer in lora_layers(model).values():
        for b in layer.lora_B:
            torch.nn.init.normal_(b, std=0.05)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", model, lora, str(base))
    table = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert table["target_modules"] == ["c_attn", "c_proj", "w1", "w2"]
    names = {n.split(".lora")[0] for n in load_file(tmp_path / "adapter" / "adapter_model.safetensors")}
    assert "base_model.model.transformer.h.0.attn.c_attn" in names
    assert "base_model.model.transformer.h.0.mlp.c_proj" in names
    ids = IDS % vocab
    with torch.no_grad():
        wanted = model.eval().logits(model.forward_full(ids))
        merge(tmp_path / "adapter", tmp_path / "merged", dtype="float32")
        merged = load_model(tmp_path / "merged", precision="fp32")[0]
        assert merged.config.architecture == "qwen1"
        torch.testing.assert_close(merged.logits(merged.forward_full(ids)), wanted, rtol=0, atol=1e-4)
        # the gate is w2 and the up w1: exchanging them must show
        tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        swapped = {
            n.replace(".w1.", ".w?.").replace(".w2.", ".w1.").replace(".w?.", ".w2."): t for n, t in tensors.items()
        }
        save_file(swapped, tmp_path / "adapter" / "adapter_model.safetensors")
        other = load_model(base, precision="fp32")[0]
        load_adapter(other, other.config, tmp_path / "adapter")
        assert (other.logits(other.forward_full(ids)) - wanted).abs().max() > 1e-3


@pytest.fixture
def adapter(tmp_path) -> Path:
    base = save_hf(tmp_path / "base")
    trained(base, tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(adapter: Path, **changes) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"peft_type": "IA3"}, UsageError),
        ({"use_dora": True}, UsageError),
        ({"alpha_pattern": {"q_proj": 4}}, UsageError),
        ({"r": 0}, BadFile),
        ({"r": 10**9}, BadFile),
        ({"r": "4"}, BadFile),
        ({"r": 8}, BadFile),
        ({"lora_alpha": None}, BadFile),
    ],
)
def test_an_adapter_that_would_be_misread_is_refused(adapter, changes, error):
    change_config(adapter, **changes)
    with pytest.raises(error):
        read_adapter(adapter, network(adapter.parent / "base").config)


def test_damaged_adapters_are_refused(adapter):
    config = network(adapter.parent / "base").config
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(iter(tensors))
    for wrong in (
        {n: t for n, t in tensors.items() if n != first},  # an A without its B
        tensors | {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": tensors[first].clone()},
        tensors | {first: tensors[first][:1].clone()},
        tensors | {first: tensors[first].to(torch.int32)},
    ):
        save_file(wrong, weights)
        with pytest.raises(BadFile):
            read_adapter(adapter, config)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(BadFile):
        read_adapter(adapter, config)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(BadFile, match="pickle"):
        read_adapter(adapter, config)
    with pytest.raises(NotFound):
        read_adapter(adapter.parent, config)


def test_merging_names_what_it_cannot_do(adapter, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(UsageError, match="not empty"):
        merge(adapter, tmp_path / "full")
    with pytest.raises(NotFound, match="holds no adapter"):
        merge(tmp_path / "full", tmp_path / "merged")
    change_config(adapter, base_model_name_or_path="elsewhere/base")  # as typed where it was trained
    with pytest.raises(NotFound, match="not found from here") as caught:
        merge(adapter, tmp_path / "merged")
    assert "--base" in (caught.value.hint or "")
    change_config(adapter, base_model_name_or_path=None)
    with pytest.raises(UsageError, match="does not name its base"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_rounds_once_to_the_dtype_asked_for(adapter, tmp_path):
    wide, narrow = tmp_path / "wide", tmp_path / "narrow"
    merge(adapter, wide)
    merge(adapter, narrow, dtype="bfloat16")
    full, half = load_file(wide / "model.safetensors"), load_file(narrow / "model.safetensors")
    assert all(torch.equal(full[name].to(torch.bfloat16), half[name]) for name in full)
    assert json.loads((narrow / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_training_sees_is_what_inference_sees(adapter):
    """The training forward pass and the engine's network agree on the hidden states."""
    from qwenfit.tune.batch import TrainBatch

    model = network(adapter.parent / "base")
    load_adapter(model, model.config, adapter, merge=False)
    positions = torch.arange(20).expand(2, 20)
    batch = TrainBatch(IDS, IDS, positions, None, [])
    with torch.no_grad():
        torch.testing.assert_close(hidden_states(model, batch).view(2, 20, -1), model.forward_full(IDS))
