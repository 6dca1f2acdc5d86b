"""qwen.tiktoken gives the ids and texts of Qwen-1's own tokenizer, and nothing hostile passes for one."""

from __future__ import annotations

import base64
import json
import unicodedata
from pathlib import Path

import pytest
from fixtures_tokenizer import make_config

from qwenfit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from qwenfit.checkpoint.tokenizer_tiktoken import MAX_FILE_BYTES, WHITESPACE_RUN, _read_ranks
from qwenfit.checkpoint.vocabulary import SPLIT_PATTERN
from qwenfit.errors import BadFile, NotFound, UsageError


def rows(golden: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (golden / "tokenizer" / name).read_text().splitlines()]


def test_ids_equal_the_originals_whichever_specials_are_allowed(qwen1: Tokenizer, golden: Path) -> None:
    examples = rows(golden, "encode.jsonl")
    assert len(examples) == 401
    for row in examples:
        text, ids = row["text"], row["ids"]
        assert qwen1.encode(text, allow_special=True) == ids
        assert qwen1.encode(text) == row.get("ids_no_special", ids)
        assert qwen1.encode(text, allow_special={"<|endoftext|>"}) == row.get("ids_only_endoftext", ids)
        assert qwen1.decode(ids, skip_special=False) == row.get("decoded", text)


def test_texts_equal_the_originals_also_when_cut_inside_a_character(qwen1: Tokenizer, golden: Path) -> None:
    examples = rows(golden, "decode.jsonl")
    assert len(examples) == 120
    for row in examples:
        assert qwen1.decode(row["ids"], skip_special=False) == row["text"]
        assert qwen1.decode(row["ids"]) == row["text_skip_special"]
        stream = qwen1.detokenizer(skip_special=False)
        assert "".join(map(stream.push, row["ids"])) + stream.finish() == row["text"]


def test_text_never_becomes_special(qwen1: Tokenizer) -> None:
    for text in qwen1.special_tokens:
        ids = qwen1.encode(f"a{text}b")
        assert not qwen1.special_ids & set(ids)
        assert qwen1.decode(ids) == f"a{text}b"


def test_padding_rows_have_no_text(qwen1: Tokenizer) -> None:
    assert qwen1.vocab_size == 151_851
    for token_id in (151_851, 151_935, -1):
        with pytest.raises(UsageError, match="no text"):
            qwen1.decode([token_id])
        with pytest.raises(UsageError, match="no text"):
            qwen1.detokenizer().push(token_id)


@pytest.mark.parametrize("unit", ["a", " ", "\n", "!", "中", "1", "😀", "\u0301", "\t", "\u3000", " \n", " x"])
def test_a_million_of_one_thing_round_trips(qwen1: Tokenizer, unit: str) -> None:
    text = unit * (1_000_000 // len(unit)) + "x"
    assert qwen1.decode(qwen1.encode(text)) == unicodedata.normalize("NFC", text)


def test_long_whitespace_is_cut_only_where_the_reference_has_no_answer(qwen1: Tokenizer, qwen_tiktoken: Path) -> None:
    import tiktoken

    reference = tiktoken.Encoding(
        "qwen", pat_str=SPLIT_PATTERN, mergeable_ranks=_read_ranks(qwen_tiktoken), special_tokens={}
    )
    text = "word" * 100 + " " * WHITESPACE_RUN + "word\n" + "\t" * 1000 + "x"
    assert qwen1.encode(text) == reference.encode_ordinary(text)
    longer = "word" + " " * (2 * WHITESPACE_RUN + 5) + "word"
    assert qwen1.decode(qwen1.encode(longer)) == longer


def test_lone_surrogates_become_replacement_characters(qwen1: Tokenizer) -> None:
    assert qwen1.decode(qwen1.encode("a\ud800b")) == "a\ufffdb"
    assert qwen1.decode(qwen1.encode("\ud83d\ude00")) == "😀"


def test_unknown_specials_are_a_usage_error(qwen1: Tokenizer) -> None:
    with pytest.raises(UsageError, match="no special token"):
        qwen1.encode("x", allow_special={"<|nope|>"})
    with pytest.raises(UsageError, match="no special token"):
        qwen1.encode("x", allow_special="<|im_end|>")


def test_chat_models_stop_at_all_three_and_base_models_at_endoftext(qwen_tiktoken: Path, tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").symlink_to(qwen_tiktoken)
    config = make_config(151_936, "qwen1")
    assert load_tokenizer(tmp_path, config).eos_ids == (151_643, 151_644, 151_645)
    (tmp_path / "generation_config.json").write_text('{"chat_format": "raw"}')
    assert load_tokenizer(tmp_path / "generation_config.json", config).eos_ids == (151_643,)


def test_more_tokens_than_embedding_rows_is_refused(qwen_tiktoken: Path, tmp_path: Path) -> None:
    (tmp_path / "qwen.tiktoken").symlink_to(qwen_tiktoken)
    with pytest.raises(BadFile, match="151851 tokens and the model 288 rows"):
        load_tokenizer(tmp_path, make_config(288, "qwen1"))


def test_no_vocabulary_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"no tokenizer.json and no qwen.tiktoken"):
        load_tokenizer(tmp_path, make_config(288))


def line(token: bytes, rank: int) -> bytes:
    return base64.b64encode(token) + b" %d\n" % rank


BYTES = b"".join(line(bytes([b]), b) for b in range(256))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "byte 0x00 has no token"),
        (BYTES.replace(line(b"A", 65), b""), "byte 0x41 has no token"),
        (b"!!!! 0\n", "line 1: expected"),
        (b"QQ 0\n", "line 1: expected"),
        (b"QQ== zero\n", "line 1: expected"),
        (b"QQ==\n", "line 1: expected"),
        (b"QQ== 1 2\n", "line 1: expected"),
        (b"QQ== " + b"9" * 10_000 + b"\n", "line 1: expected"),
        (b"\xff\xfe\x00", "line 1: expected"),
        (line(b"A", 151_643), "clashes with the special tokens"),
        (line(b"A", -1), "clashes with the special tokens"),
        (line(b"A", 0) + line(b"A", 1), "line 2: the token is empty or listed twice"),
        (BYTES, "256 different ranks"),
        (BYTES + b"".join(line(b"%06d" % i, 256 + i % 1000) for i in range(151_387)), "1256 different ranks"),
        (b"IQ== 0\n" * 2_500_000, "larger than 16 MiB"),
    ],
)
def test_broken_vocabularies_are_refused_in_a_sentence(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "qwen.tiktoken").write_bytes(data)
    with pytest.raises(BadFile, match=message) as error:
        load_tokenizer(tmp_path, make_config(151_936, "qwen1"))
    assert "\n" not in error.value.message and len(error.value.message) < 300


def test_only_the_allowed_bytes_of_an_endless_file_are_read(tmp_path: Path) -> None:
    with (tmp_path / "qwen.tiktoken").open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of zeros that takes no space
    with pytest.raises(BadFile, match=f"larger than {MAX_FILE_BYTES >> 20} MiB"):
        load_tokenizer(tmp_path, make_config(151_936, "qwen1"))
