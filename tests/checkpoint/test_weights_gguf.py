"""Every type that a GGUF may hold is what the gguf package says; every architecture gives the golden logits."""

import json
import sys
import warnings

import pytest
import torch
from models import HALVES, finish_gguf, gguf_writer, prompt_logits, qwen2_config, write_random_gguf
from safetensors.torch import load_file

from qwenfit.checkpoint.headers_gguf import GGML_TYPES, read_gguf_header
from qwenfit.checkpoint.load import load_model
from qwenfit.checkpoint.weights_gguf import PLAIN, QUANTIZED, GGUFSource
from qwenfit.config import TensorInfo
from qwenfit.errors import QwenfitError
from qwenfit.kernels import gguf_blocks, rounding
from qwenfit.kernels.packed import pack
from qwenfit.quantize.rtn import quantize_rtn

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


def source_of(path, name, kind, raw):
    """A file of one tensor, x.weight, and its GGUFSource."""
    assert GGML_TYPES[kind][0] == name and GGML_TYPES[kind][1:] == gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tensor("first.weight", np.zeros(4, np.float32))  # the other does not begin the data
    writer.add_tensor("x.weight", raw, raw_dtype=kind)
    finish_gguf(writer)
    tensors = read_gguf_header(path).tensors
    infos = [TensorInfo(t.name, t.type_name, t.shape, t.nbytes, str(path), t.offset) for t in tensors]
    return GGUFSource(str(path), infos)


def same_numbers(got, expected):
    """Bit for bit, where they are numbers."""
    bits = torch.int32 if got.dtype == torch.float32 else torch.int16
    return torch.equal(got.isnan(), expected.isnan()) and torch.equal(
        got.nan_to_num(7.0, torch.inf, -torch.inf).view(bits),
        expected.nan_to_num(7.0, torch.inf, -torch.inf).view(bits),
    )


CASES = [(name, "as usual") for name in sorted(QUANTIZED | set(PLAIN))]
CASES += [(name, "no compiler") for name in sorted(gguf_blocks.TYPES)]


@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_type_is_what_the_gguf_package_makes_of_it(tmp_path, monkeypatch, name, how):
    if how == "no compiler":
        monkeypatch.setattr(gguf_blocks, "usable", lambda: False)
    kind = gguf.GGMLQuantizationType[name]
    raw = stored_bytes(kind, np.random.default_rng(0))
    source = source_of(tmp_path / "m.gguf", name, kind, raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # random bytes are at times an infinite scale
        expected = torch.from_numpy(np.array(gguf.quants.dequantize(raw, kind), np.float32)).view(ROWS, COLUMNS)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            whole, part = torch.empty(ROWS, COLUMNS, dtype=dtype), torch.empty(33, COLUMNS, dtype=dtype)
            source.read_rows("x.weight", 0, whole)
            source.read_rows("x.weight", 77, part)
            assert same_numbers(whole, expected.to(dtype))
            assert same_numbers(part, expected[77:110].to(dtype))
        columns = torch.empty(COLUMNS, 33).T  # not contiguous
        source.read_rows("x.weight", 77, columns)
    assert same_numbers(columns, expected[77:110])


@pytest.mark.parametrize("name", sorted(gguf_blocks.TYPES))
def test_random_bytes_are_what_the_gguf_package_makes_of_them(tmp_path, name):
    """Infinite, subnormal and negative scales, and every code."""
    kind = gguf.GGMLQuantizationType[name]
    elements, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(1).integers(0, 256, (ROWS, COLUMNS // elements * nbytes), dtype=np.uint8)
    got = torch.empty(ROWS, COLUMNS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        source_of(tmp_path / "m.gguf", name, kind, raw).read_rows("x.weight", 0, got)
        expected = torch.from_numpy(np.array(gguf.quants.dequantize(raw, kind), np.float32)).view(ROWS, COLUMNS)
    assert same_numbers(got, expected)


@pytest.mark.skipif(not gguf_blocks.usable(), reason="needs a C compiler")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", sorted(gguf_blocks.TYPES))
def test_blocks_round_to_what_their_numbers_round_to(tmp_path, name, bits):
    """Straight from the file's bytes into the packed layout, also from a row in the middle on."""
    kind = gguf.GGMLQuantizationType[name]
    raw = stored_bytes(kind, np.random.default_rng(0))
    for at in HALVES[name]:
        raw.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])[:, at : at + 2] = np.array([0.01], np.float16).view(np.uint8)
    source = source_of(tmp_path / "m.gguf", name, kind, raw)
    numbers = torch.from_numpy(np.array(gguf.quants.dequantize(raw, kind), np.float32)).view(ROWS, COLUMNS)
    expected = pack(quantize_rtn(numbers, bits, 128), torch.bfloat16)
    got = rounding.empty(bits, ROWS, COLUMNS, 128)
    for start, stop in ((0, 48), (48, ROWS)):
        stored = source.read_blocks("x.weight", start, stop - start)
        rounding.round_blocks(source.block_type("x.weight"), stored, stop - start, got, start)
    assert torch.equal(got.codes, expected.codes) and torch.equal(got.scales, expected.scales)


@pytest.mark.skipif(not gguf_blocks.usable(), reason="needs a C compiler")
@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_a_model_is_rounded_the_same_with_and_without_the_c_code_for_blocks(tmp_path, monkeypatch, precision):
    config = qwen2_config(intermediate_size=768)
    file = write_random_gguf(tmp_path / "m.gguf", config, ["Q4_K", "Q5_0", "Q6_K", "Q8_0", "Q4_0"])
    direct, _ = load_model(file, precision=precision, head_precision="int8")
    monkeypatch.setattr(gguf_blocks, "usable", lambda: False)
    by_numbers, _ = load_model(file, precision=precision, head_precision="int8")
    ids = list(range(2, 22))
    got, expected = (prompt_logits(model, ids, range(20)) for model in (direct, by_numbers))
    assert torch.equal(got, expected) and got.isfinite().all()


@pytest.mark.skipif(not gguf_blocks.usable(), reason="needs a C compiler")
def test_common_types_need_no_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)  # what the import of a missing package meets
    for name, files in (("Q4_K", "a.gguf"), ("Q8_0", "b.gguf")):
        kind = gguf.GGMLQuantizationType[name]
        source_of(tmp_path / files, name, kind, stored_bytes(kind, np.random.default_rng(0)))
    kind = gguf.GGMLQuantizationType.IQ4_NL
    with pytest.raises(QwenfitError, match="gguf"):
        source_of(tmp_path / "c.gguf", "IQ4_NL", kind, stored_bytes(kind, np.random.default_rng(0)))


def write_golden(path, folder):
    """A golden folder as llama.cpp's converter lays it out, in float32, without a vocabulary."""
    writer, names = gguf_writer(path, json.loads((folder / "config.json").read_text()))
    for name, tensor in load_file(folder / "model.safetensors").items():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), tensor.numpy())
    finish_gguf(writer)
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
