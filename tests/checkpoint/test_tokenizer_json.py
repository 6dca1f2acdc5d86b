"""tokenizer.json gives the ids of transformers' Qwen2Tokenizer; what is not a Qwen vocabulary is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fixtures_tokenizer import CONTROL, SHOWN, TEXTS, make_config, small_transformers_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from qwenfit.checkpoint.vocabulary import AddedToken, byte_level_alphabet, byte_level_bpe
from qwenfit.errors import BadFile, QwenfitError

PIECES = st.sampled_from([*TEXTS, *CONTROL, *SHOWN, "<|im_", "start|>", " ", "\n", "\u0338", "é"])
MIXED = st.lists(PIECES | st.text(max_size=20), max_size=8).map("".join)


@settings(deadline=None, max_examples=200)
@given(text=MIXED)
def test_ids_and_text_equal_transformers(small: Tokenizer, text: str) -> None:
    oracle = small_transformers_tokenizer()
    ids = oracle.encode(text, add_special_tokens=False)
    assert small.encode(text, allow_special=True) == ids
    assert small.decode(ids, skip_special=False) == oracle.decode(ids, clean_up_tokenization_spaces=False)


@settings(deadline=None, max_examples=200)
@given(text=MIXED)
def test_text_never_becomes_special(small: Tokenizer, text: str) -> None:
    ids = small.encode(text)
    assert not set(small.special_tokens.values()) & set(ids)
    assert small.decode(ids) == oracle_nfc(text)


def oracle_nfc(text: str) -> str:
    from tokenizers import normalizers

    return str(normalizers.NFC().normalize_str(text))


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_stream_of_any_ids_shows_whole_characters_that_join_to_the_decoded_text(
    small: Tokenizer, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, small.vocab_size - 1), max_size=60))
    oracle = small_transformers_tokenizer()
    for skip in (True, False):
        stream = small.detokenizer(skip_special=skip)
        parts = [stream.push(i) for i in ids]
        assert "".join(parts) + stream.finish() == small.decode(ids, skip_special=skip)
    assert small.decode(ids, skip_special=False) == oracle.decode(ids, clean_up_tokenization_spaces=False)


def test_a_character_of_four_tokens_comes_whole(small: Tokenizer) -> None:
    ids = [i for b in "🦊".encode() for i in small_byte(small, b)]
    stream = small.detokenizer()
    assert [stream.push(i) for i in ids] == ["", "", "", "🦊"]
    assert stream.finish() == ""
    stream = small.detokenizer()
    assert [stream.push(i) for i in ids[:3]] == ["", "", ""]
    assert stream.finish() == "\ufffd"


def small_byte(tokenizer: Tokenizer, byte: int) -> list[int]:
    return [i for i in range(tokenizer.vocab_size) if tokenizer._token_bytes(i) == bytes([byte])]


def test_control_tokens_are_hidden_and_user_defined_ones_shown(small: Tokenizer) -> None:
    text = "<|im_start|>a<tool_call>b</tool_call><|im_end|>"
    ids = small.encode(text, allow_special=True)
    assert small.decode(ids) == "a<tool_call>b</tool_call>"
    assert small.decode(ids, skip_special=False) == text


def test_answers_stop_where_the_files_say_and_where_qwen_always_does(small_folder: Path, tmp_path: Path) -> None:
    specials = load_tokenizer(small_folder, make_config(1000)).special_tokens
    (tmp_path / "tokenizer.json").write_bytes((small_folder / "tokenizer.json").read_bytes())
    usual = {specials["<|endoftext|>"], specials["<|im_end|>"]}
    assert set(load_tokenizer(tmp_path, make_config(1000)).eos_ids) == usual
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert set(load_tokenizer(tmp_path, make_config(1000)).eos_ids) == usual | {7, 8}
    for bad in ('"x"', "[1.5]", "[true]", "-1"):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {bad}}}')
        with pytest.raises(BadFile, match="not a whole number"):
            load_tokenizer(tmp_path, make_config(1000))


def test_tokens_that_only_tokenizer_config_adds_are_known(small_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((small_folder / "tokenizer.json").read_bytes())
    size = load_tokenizer(tmp_path, make_config(1000)).vocab_size
    entry = {str(size): {"content": "<|new|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entry}))
    tokenizer = load_tokenizer(tmp_path, make_config(1000))
    assert tokenizer.encode("a<|new|>", allow_special=True)[-1] == size == tokenizer.vocab_size - 1


def put(*path: Any) -> Callable[[dict[str, Any]], object]:
    """Set document[path[0]][path[1]]... to the last of `path`."""

    def change(document: dict[str, Any]) -> None:
        *keys, last, value = path
        for key in keys:
            document = document[key]
        document[last] = value

    return change


FAULTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no model": lambda d: d.pop("model"),
    "vocab is a list": put("model", "vocab", []),
    "empty vocab": put("model", "vocab", {}),
    "a byte without token": lambda d: d["model"]["vocab"].pop("A"),
    "same id twice": put("model", "vocab", "A", 5),
    "id is text": put("model", "vocab", "A", "5"),
    "id is a truth value": put("model", "vocab", "A", True),
    "id is negative": put("model", "vocab", "A", -1),
    "id is huge": put("model", "vocab", "A", 2**40),
    "token is not byte-level": put("model", "vocab", "中", 999),
    "merge of absent tokens": lambda d: d["model"]["merges"].append(["zzzz", "qqqq"]),
    "merge into an absent token": lambda d: d["model"]["merges"].append(["~", "~"]),
    "merge longer than every token": lambda d: d["model"]["merges"].append([max(d["model"]["vocab"], key=len)] * 2),
    "merge of three": lambda d: d["model"]["merges"].append(["a", "b", "c"]),
    "merge of one": lambda d: d["model"]["merges"].append("ab"),
    "merge of nothing": lambda d: d["model"]["merges"].append(["a", ""]),
    "merge is null": lambda d: d["model"]["merges"].append(None),
    "merges of numbers": lambda d: d["model"]["merges"].append([1, 2]),
    "no merges": lambda d: d["model"].pop("merges"),
    "random merges": put("model", "dropout", 0.5),
    "another model": put("model", "type", "Unigram"),
    "another normalizer": put("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}),
    "a pattern that never ends": put("pre_tokenizer", "pretokenizers", 0, "pattern", {"Regex": "(a+)+b"}),
    "no pre-tokenizer": put("pre_tokenizer", None),
    "a list for a pre-tokenizer": put("pre_tokenizer", []),
    "another decoder": put("decoder", {"type": "WordPiece"}),
    "added token twice": lambda d: d["added_tokens"].append({**d["added_tokens"][-1], "id": 999}),
    "added id twice": lambda d: d["added_tokens"].append({**d["added_tokens"][-1], "content": "<|x|>"}),
    "added id of a word": lambda d: d["added_tokens"].append({"id": 3, "content": "<|x|>"}),
    "added token without text": lambda d: d["added_tokens"].append({"id": 999}),
    "empty added token": lambda d: d["added_tokens"].append({"id": 999, "content": ""}),
    "greedy added token": lambda d: d["added_tokens"].append({"id": 999, "content": "<|x|>", "rstrip": True}),
    "added tokens are text": put("added_tokens", "abc"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_vocabularies_are_refused_in_a_sentence(small_folder: Path, tmp_path: Path, fault: str) -> None:
    document = json.loads((small_folder / "tokenizer.json").read_text())
    FAULTS[fault](document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(BadFile) as error:
        load_tokenizer(tmp_path, make_config(10**6))
    assert "\n" not in error.value.message and len(error.value.message) < 300


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"null", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 50_000, b"[" + b"[]," * 2_000_000 + b"0]",
     b'{"a": 1, "a": 2}', b" " * (25 << 20)],
)  # fmt: skip
def test_files_that_are_no_small_json_object_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(BadFile):
        load_tokenizer(tmp_path, make_config(1000))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(
    small_folder: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    raw = bytearray((small_folder / "tokenizer.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "tokenizer.json").write_bytes(raw)
    try:
        tokenizer = load_tokenizer(folder, make_config(10**6))
    except QwenfitError:
        return
    assert tokenizer.decode(tokenizer.encode("abc 中")) == "abc 中"


def test_ids_in_a_gap_have_no_text(small: Tokenizer) -> None:
    alphabet = byte_level_alphabet()
    vocabulary = byte_level_bpe(alphabet, [], [AddedToken("<|end|>", 259, True)], "a file with a gap")
    assert Tokenizer(vocabulary, [259]).textless_ids == (256, 257, 258)
    assert small.textless_ids == tuple(i for i in range(small.vocab_size) if not _has_text(small, i))


def _has_text(tokenizer: Tokenizer, token_id: int) -> bool:
    try:
        return bool(tokenizer.decode([token_id], skip_special=False))
    except QwenfitError:
        return False
