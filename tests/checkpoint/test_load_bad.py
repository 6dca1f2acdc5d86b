"""Files that do not hold what their config says: one sentence, exit code 5, and no memory spent on the lie."""

import json
import struct

import pytest
import torch
from header_files import MEMORY_LIMIT, refused
from models import qwen2_config, qwen2_tensors, read_model, write_model
from safetensors.torch import save_file

from qwenfit.checkpoint.expected import check_tensors
from qwenfit.checkpoint.headers_safetensors import read_checkpoint_headers
from qwenfit.checkpoint.load import load_model, open_weights
from qwenfit.checkpoint.resolve import resolve_model, tensor_infos
from qwenfit.checkpoint.weights import CanonicalWeights
from qwenfit.checkpoint.weights_safetensors import SafetensorsSource
from qwenfit.errors import BadFile, DoesNotFit, NotFound, UsageError

UP = "model.layers.1.mlp.up_proj.weight"


def drop(tensors):
    del tensors[UP], tensors["model.norm.weight"]


def rename(tensors):
    tensors["model.layers.1.mlp.sideways_proj.weight"] = tensors.pop(UP)


def add(tensors):
    tensors["model.layers.9.mlp.up_proj.weight"] = tensors[UP].clone()


def transpose(tensors):
    tensors[UP] = tensors[UP].t().contiguous()


def shorten(tensors):
    tensors["model.layers.0.self_attn.k_proj.bias"] = torch.zeros(64, dtype=torch.bfloat16)


def make_integers(tensors):
    tensors[UP] = torch.zeros(384, 256, dtype=torch.int32)


def make_bytes(tensors):
    tensors[UP] = torch.zeros(384, 256, dtype=torch.uint8)


def add_bias(tensors):
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(256, dtype=torch.bfloat16)


SPOILED = {
    drop: "lacks 2 of the 27 tensors",
    rename: f"lacks 1 of the 27 tensors of its qwen2 model, first {UP}",
    add: "holds 1 tensors that its qwen2 model does not have, first 'model.layers.9.mlp.up_proj.weight'",
    transpose: f"first {UP}: [256, 384] instead of [384, 256]",
    shorten: "first model.layers.0.self_attn.k_proj.bias: [64] instead of [128]",
    make_integers: f"1 tensors of a type that cannot be used there, first {UP} (int32)",
    make_bytes: f"first {UP} (uint8)",
    add_bias: "first 'model.layers.0.self_attn.o_proj.bias'",
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda f: f.__name__)
def test_wrong_tensors_are_named_and_counted(tmp_path, spoil):
    tensors = qwen2_tensors(qwen2_config())
    spoil(tensors)
    folder = write_model(tmp_path / "m", qwen2_config(), tensors)
    refused(BadFile, SPOILED[spoil], lambda: weights_of(folder))
    with pytest.raises(BadFile):  # the way a user meets it: whichever check comes first
        load_model(folder)


def weights_of(folder) -> CanonicalWeights:
    """The weights against the bare config.json, without the shape check of `resolve_model`."""
    from qwenfit.checkpoint.config_json import config_from_dict, read_config_json

    config = config_from_dict(read_config_json(folder / "config.json"), "m", str(folder))
    return CanonicalWeights(SafetensorsSource(str(folder), tensor_infos(read_checkpoint_headers(folder))), config)


def test_a_config_of_more_layers_than_tensors_costs_nothing(tmp_path):
    folder = write_model(tmp_path / "m", qwen2_config(num_hidden_layers=500), qwen2_tensors(qwen2_config()))
    refused(BadFile, "too few for the 500 layers", lambda: weights_of(folder))


def test_a_head_that_differs_though_tied_is_refused(golden, tmp_path):
    config, tensors = read_model(golden / "qwen2_qwen3/qwen2_tied")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, -1] += 1e-3
    folder = write_model(tmp_path / "m", config, tensors)
    error = refused(BadFile, "lm_head.weight that differs from the embedding", lambda: load_model(folder))
    assert "tie_word_embeddings" in error.hint


def test_a_rotary_buffer_of_an_old_export_is_no_surplus(golden, tmp_path):
    config, tensors = read_model(golden / "qwen2_qwen3/qwen2_untied")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    open_weights(resolve_model(write_model(tmp_path / "m", config, tensors)))


def test_a_file_cut_after_its_header_was_read(tmp_path):
    folder = write_model(tmp_path / "m", qwen2_config(), qwen2_tensors(qwen2_config()))
    weights = open_weights(resolve_model(folder))
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(200_000)
    refused(BadFile, "ends inside a tensor", lambda: [weights.read(p, torch.float32) for p in weights.in_file_order()])


@pytest.mark.parametrize("keep", [0, 7, 100, 5_000, 400_000, -1])
def test_truncated_files(tmp_path, keep):
    folder = write_model(tmp_path / "m", qwen2_config(), qwen2_tensors(qwen2_config()))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(BadFile, "cut short", lambda: load_model(folder))


def test_overlapping_and_lying_tensors(tmp_path):
    folder = write_model(tmp_path / "m", qwen2_config(), qwen2_tensors(qwen2_config()))
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    table, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]

    def write(changed):
        header = json.dumps(changed).encode()
        file.write_bytes(struct.pack("<Q", len(header)) + header + data)

    lying = json.loads(json.dumps(table))
    lying[UP]["shape"] = [2**31, 2**31]
    write(lying)
    refused(BadFile, UP, lambda: load_model(folder))
    overlapping = json.loads(json.dumps(table))
    overlapping[UP]["data_offsets"] = overlapping["model.layers.0.mlp.up_proj.weight"]["data_offsets"]
    write(overlapping)
    refused(BadFile, "overlaps", lambda: load_model(folder))


def test_config_of_huge_sizes_allocates_nothing(tmp_path):
    import tracemalloc

    huge = qwen2_config(hidden_size=65536, num_attention_heads=512, num_key_value_heads=512, vocab_size=300_000)
    folder = write_model(tmp_path / "m", huge, qwen2_tensors(qwen2_config()))
    tracemalloc.start()
    with pytest.raises((BadFile, UsageError)):
        load_model(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY_LIMIT


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize(("tied", "head"), [(False, None), (False, "int8"), (True, "int8")])
def test_weights_beyond_what_is_free_are_refused_before_anything_is_allocated(
    tmp_path, monkeypatch, precision, tied, head
):
    """One byte less than the model will hold is too little, and no memory is asked for."""
    config = qwen2_config(tie_word_embeddings=tied)
    folder = write_model(tmp_path / "m", config, qwen2_tensors(config))
    model, _ = load_model(folder, precision=precision, head_precision=head)
    held = sum(p.nbytes for p in model.parameters())
    held += sum(m.packed.nbytes for m in model.modules() if getattr(m, "packed", None) is not None)
    monkeypatch.setattr("qwenfit.checkpoint.load.free_memory", lambda device: held)
    load_model(folder, precision=precision, head_precision=head)
    monkeypatch.setattr("qwenfit.checkpoint.load.free_memory", lambda device: held - 1)
    monkeypatch.setattr("qwenfit.kernels.pages.empty", None)
    with pytest.raises(DoesNotFit, match="are free") as caught:
        load_model(folder, precision=precision, head_precision=head)
    assert caught.value.exit_code == 3 and "qwenfit plan" in caught.value.hint


def test_a_folder_without_weights_and_a_pickle(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(qwen2_config()))
    refused(NotFound, "config but no weights", lambda: load_model(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(BadFile, "pickle", lambda: load_model(tmp_path))


def test_remote_code_named_in_the_config_is_never_read(tmp_path):
    config = qwen2_config(auto_map={"AutoModelForCausalLM": "evil.Model"})
    folder = write_model(tmp_path / "m", config, qwen2_tensors(qwen2_config()))
    (folder / "evil.py").write_text("open('canary', 'w')\nraise SystemExit(9)\n")
    load_model(folder)
    assert not (folder / "canary").exists()


def test_nan_weights_load(tmp_path):
    tensors = qwen2_tensors(qwen2_config())
    tensors[UP][0, 0] = float("nan")
    model, _ = load_model(write_model(tmp_path / "m", qwen2_config(), tensors))
    assert model.state_dict()["layers.1.mlp.gate_up_proj.weight"].isnan().sum() == 1


def test_check_names_a_hostile_tensor_on_one_line():
    info = {"x\n" * 500: None}
    refused(BadFile, "holds 1 tensors", lambda: check_tensors("m", info, {}, {}, lambda name: True, "qwen2"))


def test_one_safetensors_file_of_another_model(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(qwen2_config(num_hidden_layers=1)))
    save_file({"model.embed_tokens.weight": torch.zeros(320, 256)}, folder / "model.safetensors")
    refused(BadFile, "lacks 14 of the 15 tensors", lambda: weights_of(folder))
