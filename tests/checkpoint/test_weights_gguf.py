"""Every type that a GGUF may hold is what the gguf package says; every architecture gives the golden logits."""

import json
import warnings

import pytest
import torch
from models import prompt_logits
from safetensors.torch import load_file

from qwenfit.checkpoint.headers_gguf import GGML_TYPES, read_gguf_header
from qwenfit.checkpoint.load import load_model
from qwenfit.checkpoint.weights_gguf import PLAIN, QUANTIZED, GGUFSource
from qwenfit.config import TensorInfo

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")
ROWS, COLUMNS = 300, 1024  # more rows than are dequantised at once


def stored_bytes(kind, rng):
    """[rows, bytes of a row]: rounded random weights, or random bytes where the package cannot round to the type."""
    try:
        rounded = gguf.quants.quantize(rng.standard_normal((ROWS, COLUMNS)).astype(np.float32), kind)
    except NotImplementedError:
        elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
        return rng.integers(0, 256, (ROWS, COLUMNS // elements * nbytes), dtype=np.uint8)
    return np.ascontiguousarray(rounded).view(np.uint8).reshape(ROWS, -1)


@pytest.mark.parametrize("name", sorted(QUANTIZED | set(PLAIN)))
def test_a_type_is_what_the_gguf_package_makes_of_it(tmp_path, name):
    kind = gguf.GGMLQuantizationType[name]
    assert GGML_TYPES[kind][0] == name and GGML_TYPES[kind][1:] == gguf.GGML_QUANT_SIZES[kind]
    raw = stored_bytes(kind, np.random.default_rng(0))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    writer.add_tensor("first.weight", np.zeros(4, np.float32))  # the other does not begin the data
    writer.add_tensor("x.weight", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensors = read_gguf_header(tmp_path / "m.gguf").tensors
    infos = [TensorInfo(t.name, t.type_name, t.shape, t.nbytes, str(tmp_path / "m.gguf"), t.offset) for t in tensors]
    source = GGUFSource(str(tmp_path / "m.gguf"), infos)
    whole, part = torch.empty(ROWS, COLUMNS), torch.empty(33, COLUMNS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # random bytes are at times an infinite scale
        expected = torch.from_numpy(np.array(gguf.quants.dequantize(raw, kind), np.float32)).view(ROWS, COLUMNS)
        source.read_rows("x.weight", 0, whole)
        source.read_rows("x.weight", 77, part)
    assert torch.equal(whole.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert torch.equal(part.nan_to_num(7.0), expected[77:110].nan_to_num(7.0))


def write_golden(path, folder):
    """A golden folder as llama.cpp's converter lays it out, in float32, without a vocabulary."""
    config = json.loads((folder / "config.json").read_text())
    arch = config["model_type"]
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], layers)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads", heads))
    writer.add_rope_freq_base(config.get("rope_theta") or config["rotary_emb_base"])
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps") or config["layer_norm_epsilon"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    if scaling := config.get("rope_scaling"):
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    for name, tensor in load_file(folder / "model.safetensors").items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("name", "prompts"),
    [
        ("qwen1/a_ntk_logn", ("L10", "L64")),  # a GGUF does not store dynamic NTK and LogN
        ("qwen1/b_plain_base1e6", ("L10", "L200")),
        *((f"qwen2_qwen3/{n}", ("L10", "L150")) for n in ("qwen2_untied", "qwen2_tied", "qwen2_yarn")),
        *((f"qwen2_qwen3/{n}", ("L10", "L150")) for n in ("qwen3_untied", "qwen3_tied")),
    ],
)
def test_an_architecture_gives_the_golden_logits(golden, tmp_path, name, prompts):
    model, config = load_model(write_golden(tmp_path / "m.gguf", golden / name), precision="fp32")
    reference = load_file(golden / name / ("prefill.safetensors" if "qwen1" in name else "reference.safetensors"))
    assert config.tie_word_embeddings == name.endswith("_tied")
    for prompt in prompts:
        got = prompt_logits(model, reference[f"{prompt}.input_ids"], reference[f"{prompt}.positions"])
        assert (got - reference[f"{prompt}.logits"]).abs().max() < 1e-4, prompt
