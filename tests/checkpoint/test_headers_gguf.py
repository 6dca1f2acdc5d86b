"""GGUF headers: against the gguf package where it is installed, and against every kind of lie."""

import os
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from header_files import QWEN2_GGUF, QWEN2_GGUF_TENSORS, gguf_bytes, gguf_head, gguf_value, only_expected, refused, text
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.checkpoint import headers_gguf
from qwenfit.checkpoint.config_gguf import config_from_gguf
from qwenfit.checkpoint.headers_gguf import GGML_TYPES, GGUFTensor, SkippedArray, read_gguf_header
from qwenfit.checkpoint.resolve import resolve_model, weight_bytes
from qwenfit.errors import BadFile, NotFound, UsageError

TINY = {"general.architecture": "qwen2"}
VALID = gguf_bytes(QWEN2_GGUF, QWEN2_GGUF_TENSORS)


def written(folder: Path, content: bytes, name: str = "model.gguf") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def real_gguf() -> Path:
    default = Path.home() / ".cache/qwenfit-tests/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    path = Path(os.environ.get("QWENFIT_TEST_GGUF", default))
    if not path.is_file():
        pytest.skip("no real GGUF: set QWENFIT_TEST_GGUF")
    return path


@pytest.mark.real
def test_the_real_file_reads_as_the_gguf_package_reads_it() -> None:
    gguf = pytest.importorskip("gguf")
    path = real_gguf()
    header = read_gguf_header(path, arrays=True)
    reader = gguf.GGUFReader(path)
    ours = {t.name: (t.ggml_type, t.shape, t.offset, t.nbytes) for t in header.tensors}
    theirs = {
        t.name: (int(t.tensor_type), tuple(int(d) for d in reversed(t.shape)), int(t.data_offset), int(t.n_bytes))
        for t in reader.tensors
    }
    assert ours == theirs
    assert header.data_start == reader.data_offset
    for key in (
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.token_type",
        "tokenizer.chat_template",
    ):
        assert header.metadata[key] == reader.fields[key].contents()


@pytest.mark.timing
@pytest.mark.real
def test_the_real_header_is_read_fast_when_arrays_are_skipped() -> None:
    path = real_gguf()
    best = 10.0
    for _ in range(5):
        start = time.perf_counter()
        header = read_gguf_header(path)
        best = min(best, time.perf_counter() - start)
    assert best < 0.25
    assert header.metadata["tokenizer.ggml.tokens"] == SkippedArray(8, 151936)
    config = resolve_model(path)
    assert (config.architecture, config.hidden_size, config.num_layers) == ("qwen2", 896, 24)
    assert (config.num_heads, config.num_kv_heads, config.head_dim, config.vocab_size) == (14, 2, 64, 151936)
    assert weight_bytes(config) == sum(tensor.nbytes for tensor in header.tensors)
    only_expected(lambda: read_gguf_header(path, arrays=True))


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    constants = pytest.importorskip("gguf.constants")
    sizes = {int(kind): (kind.name, *size) for kind, size in constants.GGML_QUANT_SIZES.items()}
    assert all(sizes[kind] == ours for kind, ours in GGML_TYPES.items())


@pytest.mark.parametrize("version", [2, 3])
def test_a_small_file_reads_back(tmp_path: Path, version: int) -> None:
    path = written(tmp_path, gguf_bytes(QWEN2_GGUF, QWEN2_GGUF_TENSORS, version=version))
    header = read_gguf_header(path)
    assert header.version == version
    assert header.metadata["tokenizer.ggml.tokens"] == SkippedArray(8, 3)
    first = header.tensors[0]
    assert first == GGUFTensor("token_embd.weight", 0, "F32", (96, 64), header.data_start, 96 * 64 * 4)
    assert header.data_start % 32 == 0
    full = read_gguf_header(path, arrays=True)
    assert full.metadata["tokenizer.ggml.tokens"] == ["a", "b", "ä"]
    assert full.metadata["tokenizer.ggml.token_type"] == [1, 1, 3]
    assert full.tensors == header.tensors


@pytest.mark.parametrize("window", [8, 9, 64, 1000, 2**20])
def test_texts_are_walked_over_wherever_the_window_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    """Inside a length, before it, inside a text, and texts longer than a window; the last one ends the header."""
    monkeypatch.setattr(headers_gguf, "WINDOW_BYTES", window)
    texts = ["x" * (number * 7 % 150) for number in range(400)]
    path = written(tmp_path, gguf_bytes(QWEN2_GGUF | {"tokenizer.ggml.merges": texts}, QWEN2_GGUF_TENSORS))
    header = read_gguf_header(path)
    assert header.metadata["tokenizer.ggml.merges"] == SkippedArray(8, 400)
    full = read_gguf_header(path, arrays=True)
    assert full.metadata["tokenizer.ggml.merges"] == texts and header.tensors == full.tensors


def test_quantized_tensors_take_whole_blocks(tmp_path: Path) -> None:
    content = gguf_bytes(TINY, {"w": (3, 512)}, ggml_type=12, bytes_per_row=lambda columns: columns // 256 * 144)
    (tensor,) = read_gguf_header(written(tmp_path, content)).tensors
    assert (tensor.type_name, tensor.nbytes) == ("Q4_K", 3 * 2 * 144)


def key_values(*pairs: bytes, count: int | None = None) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, len(pairs) if count is None else count) + b"".join(pairs) + bytes(64)


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return text("a") + struct.pack("<IIQ", 9, kind, count) + content


def info(dims: tuple[int, ...] = (2,), kind: int = 0, offset: int = 0, num_dims: int | None = None) -> bytes:
    head = struct.pack("<4sIQQ", b"GGUF", 3, 1, 0) + text("w")
    return head + struct.pack(f"<I{len(dims)}QIQ", num_dims or len(dims), *dims, kind, offset) + bytes(96)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not a GGUF file"),
        (b"GGUF", "not a GGUF file"),
        (b"GGML" + bytes(40), "not a GGUF file"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 0, 0), "big-endian"),
        (gguf_bytes(TINY, {}, version=1), "version 1"),
        (gguf_bytes(TINY, {}, version=4), "version 4"),
        (gguf_bytes(TINY, {}, counts=(2**40, 0)), "1,099,511,627,776 tensors"),
        (gguf_bytes(TINY, {}, counts=(0, 2**63)), "metadata keys"),
        (gguf_bytes({}, {}, counts=(19_999, 0)), "cut short"),
        (key_values(struct.pack("<Q", 2**60) + b"a"), "text of"),
        (key_values(text("a") + struct.pack("<IQ", 8, 2**60)), "text of"),
        (key_values(text("a") + struct.pack("<IQ", 8, 5000)), "cut short"),
        (key_values(text("a") + struct.pack("<IQ", 8, 1) + b"\xff"), "not UTF-8"),
        (key_values(text("a") + struct.pack("<I", 13)), "unknown type 13"),
        (key_values(text("a") + gguf_value(1), text("a") + gguf_value(2)), "twice"),
        (key_values(array(9, 1)), "array of arrays"),
        (key_values(array(99, 1)), "unknown type 99"),
        (key_values(array(4, 2**62)), "elements"),
        (key_values(array(8, 600_000)), "cut short"),
        (key_values(array(12, 600_000)), "cut short"),
        (key_values(array(8, 1, struct.pack("<Q", 2**64 - 1))), "cut short"),
        (gguf_bytes(TINY | {"general.alignment": 24}, {}), "alignment"),
        (gguf_bytes(TINY | {"general.alignment": 0}, {}), "alignment"),
        (gguf_bytes(TINY | {"general.alignment": 2**20}, {}), "alignment"),
        (gguf_bytes(TINY | {"general.alignment": "32"}, {}), "alignment"),
        (info(num_dims=5), "5 dimensions"),
        (info(dims=()), "0 dimensions"),
        (info(dims=(0,)), "whole F32 blocks"),
        (info(kind=36), "unknown type 36"),
        (info(dims=(33,), kind=2), "whole Q4_0 blocks"),
        (info(dims=(2**63, 2**63, 2**63, 2**63)), "cut short"),
        (info(offset=1), "off its alignment"),
        (info(offset=2**60), "cut short"),
        (gguf_bytes(TINY, {"a": (64,), "b": (64,)}, offsets={"b": 32}), "over the one before it"),
        (VALID[:-1], "cut short"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_header_that_lies_is_refused(tmp_path: Path, content: bytes, word: str) -> None:
    path = written(tmp_path, content)
    refused(BadFile, word, lambda: read_gguf_header(path))
    only_expected(lambda: read_gguf_header(path, arrays=True))


def test_a_tensor_named_twice_is_refused(tmp_path: Path) -> None:
    content = gguf_bytes(TINY, {"a": (64,), "b": (64,)}).replace(text("b") + b"\1", text("a") + b"\1")
    refused(BadFile, "twice", lambda: read_gguf_header(written(tmp_path, content)))


def test_missing_files_and_directories(tmp_path: Path) -> None:
    refused(NotFound, "no file", lambda: read_gguf_header(tmp_path / "gone.gguf"))
    refused(BadFile, "directory", lambda: read_gguf_header(tmp_path))


def config_of(folder: Path, changes: dict[str, Any], tensors: dict[str, tuple[int, ...]] = QWEN2_GGUF_TENSORS) -> Any:
    metadata = {key: value for key, value in (QWEN2_GGUF | changes).items() if value is not None}
    return config_from_gguf(read_gguf_header(written(folder, gguf_bytes(metadata, tensors))))


def test_a_config_comes_from_keys_and_tensors(tmp_path: Path) -> None:
    config = config_of(tmp_path, {})
    assert (config.architecture, config.hidden_size, config.intermediate_size, config.vocab_size) == (
        "qwen2",
        64,
        128,
        96,
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert config.rms_norm_eps == 1e-6 and config.rope_theta == 1e6
    assert config.tie_word_embeddings and config.qkv_bias and not config.qk_norm
    assert not config_of(tmp_path, {}, QWEN2_GGUF_TENSORS | {"output.weight": (96, 64)}).tie_word_embeddings
    yarn = {"qwen2.rope.scaling.type": "yarn", "qwen2.rope.scaling.factor": 4.0}
    assert config_of(tmp_path, yarn).context_length == 2048
    assert resolve_model(written(tmp_path, VALID)).num_layers == 1


def test_qwen1_takes_its_inner_width_and_ntk_from_what_is_published(tmp_path: Path) -> None:
    metadata = {
        "general.architecture": "qwen",
        "qwen.block_count": 24,
        "qwen.context_length": 8192,
        "qwen.embedding_length": 2048,
        "qwen.feed_forward_length": 11008,
        "qwen.attention.head_count": 16,
        "qwen.rope.freq_base": 10000.0,
        "qwen.attention.layer_norm_rms_epsilon": 1e-6,
    }
    head, data_bytes = gguf_head(metadata, {"token_embd.weight": (151936, 2048), "blk.0.ffn_gate.weight": (5504, 2048)})
    path = tmp_path / "qwen-1.8b.gguf"
    with path.open("wb") as file:  # sparse: the header is real, the 1.3 GB of weights are a hole
        file.write(head)
        file.truncate(len(head) + data_bytes)
    config = config_from_gguf(read_gguf_header(path))
    assert (config.intermediate_size, config.num_kv_heads, config.training_length) == (5504, 16, 8192)
    assert config.use_dynamic_ntk and config.use_logn_attn and config.context_length == 32768


@pytest.mark.parametrize(
    ("changes", "kind", "word"),
    [
        ({"general.architecture": "qwen2moe"}, UsageError, "'qwen2moe'"),
        ({"general.architecture": "qwen3moe"}, UsageError, "'qwen3moe'"),
        ({"general.architecture": "llama"}, UsageError, "'llama'"),
        ({"general.architecture": None}, BadFile, "no general.architecture"),
        ({"split.count": 3}, UsageError, "split GGUF"),
        ({"qwen2.block_count": None}, BadFile, "no qwen2.block_count"),
        ({"qwen2.block_count": 4_000_000_000}, BadFile, "not between"),
        ({"qwen2.block_count": "1"}, BadFile, "not an integer"),
        ({"qwen2.embedding_length": 128}, BadFile, "token_embd.weight"),
        ({"qwen2.feed_forward_length": 64}, BadFile, "gate of 128 rows"),
        ({"qwen2.attention.head_count": 5}, BadFile, "do not divide"),
        ({"qwen2.attention.head_count_kv": 3}, BadFile, "multiple"),
        ({"qwen2.attention.key_length": 15}, BadFile, "odd"),
        ({"qwen2.rope.freq_base": float("nan")}, BadFile, "freq_base"),
        ({"qwen2.attention.layer_norm_rms_epsilon": float("inf")}, BadFile, "epsilon"),
        ({"qwen2.rope.scaling.type": "linear"}, UsageError, "'linear'"),
        ({"qwen2.rope.scaling.type": "yarn"}, BadFile, "factor"),
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, Any], kind: type, word: str) -> None:
    refused(kind, word, lambda: config_of(tmp_path, changes))


def test_more_layers_than_tensors_is_a_lie(tmp_path: Path) -> None:
    path = written(tmp_path, gguf_bytes(QWEN2_GGUF | {"qwen2.block_count": 2}, QWEN2_GGUF_TENSORS))
    refused(BadFile, "asks for", lambda: resolve_model(path))


VALUES = st.integers(0, 2**32 - 1) | st.floats(width=32) | st.booleans() | st.text(max_size=8)


def fuzzed(folder: pytest.TempPathFactory, content: bytes) -> None:
    path = written(folder.getbasetemp(), content, "fuzz.gguf")
    for arrays in (False, True):
        only_expected(lambda: config_from_gguf(read_gguf_header(path, arrays)))  # noqa: B023


@settings(max_examples=100, deadline=1000)
@given(content=st.binary(max_size=300) | st.binary(max_size=300).map(lambda b: struct.pack("<4sI", b"GGUF", 3) + b))
def test_fuzz_random_bytes(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    fuzzed(tmp_path_factory, content)


@settings(max_examples=200, deadline=1000)
@given(changes=st.lists(st.tuples(st.integers(0, 1800), st.integers(0, 255)), min_size=1, max_size=4))
def test_fuzz_mutated_headers(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]) -> None:
    raw = bytearray(VALID)
    for position, byte in changes:
        raw[position] = byte
    fuzzed(tmp_path_factory, bytes(raw))


@settings(max_examples=100, deadline=1000)
@given(
    lies=st.dictionaries(st.sampled_from(sorted(QWEN2_GGUF)), VALUES, max_size=4),
    counts=st.none() | st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
    offsets=st.dictionaries(st.sampled_from(sorted(QWEN2_GGUF_TENSORS)), st.integers(0, 2**64 - 1), max_size=2),
)
def test_fuzz_structured_lies(
    tmp_path_factory: pytest.TempPathFactory,
    lies: dict[str, Any],
    counts: tuple[int, int] | None,
    offsets: dict[str, int],
) -> None:
    fuzzed(tmp_path_factory, gguf_bytes(QWEN2_GGUF | lies, QWEN2_GGUF_TENSORS, counts=counts, offsets=offsets))
