"""The name maps: every published tensor has one canonical place, and none is left over."""

import pytest

from qwenfit.catalog import dense_model_names, get_model
from qwenfit.checkpoint.expected import stored_parameters
from qwenfit.checkpoint.names import Piece, canonical_parameters, layout_of, pieces_of
from qwenfit.config import checkpoint_tensors

QWEN_7B_LAYER_3 = {  # the tensors of one layer of Qwen-7B's published index
    "transformer.h.3.ln_1.weight",
    "transformer.h.3.attn.c_attn.weight",
    "transformer.h.3.attn.c_attn.bias",
    "transformer.h.3.attn.c_proj.weight",
    "transformer.h.3.ln_2.weight",
    "transformer.h.3.mlp.w1.weight",
    "transformer.h.3.mlp.w2.weight",
    "transformer.h.3.mlp.c_proj.weight",
}


def test_qwen1_layer_takes_exactly_the_published_tensors():
    parameters = stored_parameters(get_model("Qwen-7B"), gguf=False)
    of_layer = {name for p in parameters.values() if p.name.startswith("layers.3.") for name in p.stored}
    assert of_layer == QWEN_7B_LAYER_3


def test_qwen1_gate_is_w2_and_up_is_w1():
    config = get_model("Qwen-7B")
    pieces = pieces_of("layers.3.mlp.gate_up_proj", 2 * 11008, config, layout_of(config, gguf=False))
    assert pieces == (
        Piece("transformer.h.3.mlp.w2", 0, 11008),
        Piece("transformer.h.3.mlp.w1", 11008, 22016),
    )


def test_grouped_heads_give_unequal_rows():
    config = get_model("Qwen2.5-7B")
    pieces = pieces_of("layers.0.self_attn.qkv_proj", 4608, config, layout_of(config, gguf=False))
    assert [(p.stored[-6:], p.start, p.stop) for p in pieces] == [
        ("q_proj", 0, 3584),
        ("k_proj", 3584, 4096),
        ("v_proj", 4096, 4608),
    ]


@pytest.mark.parametrize("name", dense_model_names())
def test_every_catalog_model_covers_all_its_parameters(name):
    """The shapes of names.py and those of config.checkpoint_tensors, written apart, describe the same elements."""
    config = get_model(name)

    def elements(shape):
        return shape[0] * (shape[1] if len(shape) == 2 else 1)

    assert sum(map(elements, canonical_parameters(config).values())) == config.parameters
    stored = [shape for p in stored_parameters(config, gguf=False).values() for shape in p.stored.values()]
    assert sorted(stored) == sorted(tensor.shape for tensor in checkpoint_tensors(config))


@pytest.mark.parametrize(("name", "arch"), [("Qwen-7B", "QWEN"), ("Qwen2.5-7B", "QWEN2"), ("Qwen3-8B", "QWEN3")])
def test_gguf_names_are_those_of_the_gguf_package(name, arch):
    gguf = pytest.importorskip("gguf")
    known = {
        gguf.TENSOR_NAMES[tensor].format(bid=layer)
        for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH[arch]]
        for layer in range(80)
    }
    stored = [n for p in stored_parameters(get_model(name), gguf=True).values() for n in p.stored]
    assert {n.rpartition(".")[0] for n in stored} <= known


@pytest.mark.parametrize(("name", "arch"), [("Qwen-7B", "QWEN"), ("Qwen2.5-7B", "QWEN2"), ("Qwen3-8B", "QWEN3")])
def test_gguf_and_safetensors_names_map_as_llama_cpp_maps_them(name, arch):
    gguf = pytest.importorskip("gguf")
    config = get_model(name)
    to_gguf = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch], config.num_layers)
    published, converted = stored_parameters(config, gguf=False), stored_parameters(config, gguf=True)
    for parameter in published.values():
        ours = [piece.stored for piece in converted[parameter.name].pieces]
        assert [to_gguf.get_name(piece.stored) for piece in parameter.pieces] == ours
