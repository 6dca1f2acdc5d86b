"""safetensors headers: what the files hold, to the byte, and that nothing a header claims is believed."""

import json
import struct
from pathlib import Path

import pytest
from header_files import only_expected, refused, safetensors_bytes, with_header
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.checkpoint.headers_safetensors import (
    INDEX_NAME,
    MAX_HEADER_BYTES,
    read_checkpoint_headers,
    read_index,
    read_safetensors_header,
)
from qwenfit.errors import BadFile, NotFound

SHAPES = {"a.weight": (4, 8), "b.bias": (3,)}
A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize("name", ["qwen1/a_ntk_logn", "qwen1_gptq/int4", "qwen2_qwen3/qwen3_tied"])
def test_every_tensor_is_where_safetensors_itself_finds_it(golden: Path, name: str) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    path = golden / name / "model.safetensors"
    header = read_safetensors_header(path)
    expected = safetensors.load_file(path)
    raw = path.read_bytes()
    assert header.tensors.keys() == expected.keys()
    for key, tensor in header.tensors.items():
        begin = header.data_start + tensor.begin
        assert tensor.shape == expected[key].shape and tensor.dtype == str(expected[key].dtype)
        assert raw[begin : begin + tensor.nbytes] == expected[key].tobytes()


def entry(**changes: object) -> dict[str, object]:
    return {"a": A | changes}


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "cut short"),
        (b"1234567", "cut short"),
        (struct.pack("<Q", 2**63) + b"{}", "cut short"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + bytes(MAX_HEADER_BYTES + 1), "announces a header of"),
        (with_header(b"\xff\xfe", 0), "not UTF-8"),
        (with_header(b'{"a": ', 0), "not JSON or is cut short"),
        (with_header(b"[]", 0), "not a JSON object"),
        (with_header(b"[" * 5000, 0), "nested too deeply"),
        (with_header(b'{"a": NaN}', 0), "NaN"),
        (with_header(b'{"a": ' + b"9" * 5000 + b"}", 0), "too many digits"),
        (with_header(b"[" + b"0," * 200_000 + b"0]", 0), "more than 160,000 JSON values"),
        (with_header(b'{"a":%s,"a":%s}' % (json.dumps(A).encode(), json.dumps(A).encode()), 8), "twice"),
        (with_header({"__metadata__": {"x": 1}}, 0), "__metadata__"),
        (with_header({"a": 3}, 8), "something else than"),
        (with_header({"a": {"dtype": "F32"}}, 8), "something else than"),
        (with_header(entry(dtype="F3"), 8), "unknown dtype 'F3'"),
        (with_header(entry(dtype=["F32"]), 8), "unknown dtype"),
        (with_header(entry(shape=[-2]), 8), "not a short list of sizes"),
        (with_header(entry(shape=[True, 2]), 8), "not a short list of sizes"),
        (with_header(entry(shape=[2.0]), 8), "not a short list of sizes"),
        (with_header(entry(shape=[1] * 9 + [2]), 8), "not a short list of sizes"),
        (with_header(entry(shape=[2**62, 2**62]), 8), "where its shape needs"),
        (with_header(entry(shape=[3]), 8), "8 bytes where its shape needs 12"),
        (with_header(entry(data_offsets=[8, 0]), 8), "where its shape needs 8"),
        (with_header(entry(data_offsets=[0]), 8), "two byte positions"),
        (with_header(entry(data_offsets=[8, 16]), 16), "leaves a gap"),
        (with_header({"a": A, "b": A | {"data_offsets": [4, 12]}}, 12), "overlaps"),
        (with_header(entry(), 7), "cut short"),
        (with_header(entry(), 9), "belong to no tensor"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_header_that_lies_is_refused(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(BadFile, word, lambda: read_safetensors_header(path))
    only_expected(lambda: read_safetensors_header(path))


def test_the_dearest_headers_that_pass_the_limits_stay_within_the_memory_limit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    keys = b",".join(b'"%d\xf0\x9f\x98\x80":1' % i for i in range(159_000))
    for content in (
        b"{" + keys + b"}",
        b"[" + b"{}," * 75_000 + b"{}]",
        b'["\xf0\x9f\x98\x80' + b" " * 4_000_000 + b'"]',
    ):
        path.write_bytes(with_header(content, 0))
        only_expected(lambda: read_safetensors_header(path))


def sharded(folder: Path, weight_map: dict[str, str] | None = None) -> Path:
    (folder / "one.safetensors").write_bytes(safetensors_bytes({"a": (2,)}))
    (folder / "two.safetensors").write_bytes(safetensors_bytes({"b": (3,)}))
    default = {"a": "one.safetensors", "b": "two.safetensors"}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": default if weight_map is None else weight_map}))
    return folder


def test_an_index_joins_its_shards(tmp_path: Path) -> None:
    headers = read_checkpoint_headers(sharded(tmp_path))
    assert {name: list(header.tensors) for name, header in headers.items()} == {
        "one.safetensors": ["a"],
        "two.safetensors": ["b"],
    }


@pytest.mark.parametrize(
    "shard",
    [*(f"{start}one.safetensors" for start in ("../", "/etc/", "x/", "x\\", "c:", ".", "\0")), "one.bin", "", 3, None],
)
def test_a_shard_is_a_file_name_inside_the_folder(tmp_path: Path, shard: object) -> None:
    refused(BadFile, "not a file name inside the folder", lambda: read_index(sharded(tmp_path, {"a": shard})))  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("weight_map", "kind", "word"),
    [
        ({}, BadFile, "no weight_map"),
        ({"a": "one.safetensors", "b": "gone.safetensors"}, NotFound, "missing"),
        ({"a": "one.safetensors", "c": "one.safetensors"}, BadFile, "does not hold it"),
        ({"b": "one.safetensors"}, BadFile, "the index does not list"),
        ({"a": "two.safetensors", "b": "two.safetensors"}, BadFile, "does not hold it"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, BadFile, "places elsewhere"),
    ],
)
def test_index_and_shards_must_agree(tmp_path: Path, weight_map: dict[str, str], kind: type, word: str) -> None:
    refused(kind, word, lambda: read_index(sharded(tmp_path, weight_map)))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "two.safetensors").write_bytes(safetensors_bytes({"b": (3,), "a": (2,)}))
    refused(BadFile, "places elsewhere", lambda: read_index(tmp_path))


def test_links_of_the_hugging_face_cache_are_followed_and_others_are_not(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "hash").write_bytes(safetensors_bytes(SHAPES))
    (snapshot / "model.safetensors").symlink_to("../../blobs/hash")
    assert read_checkpoint_headers(snapshot)["model.safetensors"].tensors["a.weight"].shape == (4, 8)
    (tmp_path / "secret.safetensors").write_bytes(safetensors_bytes(SHAPES))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "secret.safetensors")
    refused(BadFile, "leads out of", lambda: read_checkpoint_headers(snapshot))
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("model.safetensors")
    refused(BadFile, "leads nowhere", lambda: read_checkpoint_headers(snapshot))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt", "weights.pkl"])
def test_pickles_alone_are_refused_with_the_command_that_converts(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04")
    error = refused(BadFile, "pickle", lambda: read_checkpoint_headers(tmp_path))
    assert error.hint and "safe_serialization=True" in error.hint
    (tmp_path / "model.safetensors").write_bytes(safetensors_bytes(SHAPES))
    assert read_checkpoint_headers(tmp_path).keys() == {"model.safetensors"}


def test_which_safetensors_files_belong_must_be_clear(tmp_path: Path) -> None:
    assert read_checkpoint_headers(tmp_path) == {}
    (tmp_path / "gptq_model-4bit-128g.safetensors").write_bytes(safetensors_bytes(SHAPES))
    assert read_checkpoint_headers(tmp_path).keys() == {"gptq_model-4bit-128g.safetensors"}
    (tmp_path / "other.safetensors").write_bytes(safetensors_bytes(SHAPES))
    refused(BadFile, "2 safetensors files", lambda: read_checkpoint_headers(tmp_path))
    refused(NotFound, "cannot be listed", lambda: read_checkpoint_headers(tmp_path / "gone"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "a"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
ENTRY = st.fixed_dictionaries({"dtype": st.just("F32") | JSON, "shape": st.just([2]) | JSON, "data_offsets": JSON})


@settings(max_examples=150, deadline=1000)
@given(
    content=st.binary(max_size=200)
    | st.builds(with_header, JSON | st.dictionaries(st.text(max_size=4), ENTRY, max_size=4), st.integers(0, 64))
)
def test_fuzz_random_and_lying_headers(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(content)
    only_expected(lambda: read_safetensors_header(path))


@settings(max_examples=150, deadline=1000)
@given(changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=4))
def test_fuzz_mutated_valid_headers(tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]) -> None:
    raw = bytearray(safetensors_bytes(SHAPES))
    for position, byte in changes:
        raw[position % len(raw)] = byte
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(raw)
    only_expected(lambda: read_safetensors_header(path))
