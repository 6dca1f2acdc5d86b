"""A GGUF's vocabulary is the tokenizer.json it was converted from."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from fixtures_tokenizer import CONTROL, SHOWN, TEXTS, make_config, small_vocabulary

from qwenfit.checkpoint.headers_gguf import read_gguf_header
from qwenfit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from qwenfit.checkpoint.tokenizer_gguf import read_gguf_vocabulary
from qwenfit.errors import BadFile


def metadata(padding: int = 5) -> dict[str, Any]:
    """The small vocabulary as llama.cpp's converter writes it: added tokens after the words, then padding."""
    vocab, merges = small_vocabulary()
    added = [*CONTROL, *SHOWN]
    size = len(vocab) + len(added)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [
            *sorted(vocab, key=vocab.__getitem__),
            *added,
            *(f"[PAD{size + i}]" for i in range(3)),
        ],
        "tokenizer.ggml.token_type": [1] * len(vocab) + [3] * len(CONTROL) + [4] * len(SHOWN) + [padding] * 3,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
    }


def test_ids_equal_the_tokenizer_json(small: Tokenizer) -> None:
    tokenizer = Tokenizer(read_gguf_vocabulary(metadata(), "x.gguf"), [])
    assert tokenizer.special_tokens == small.special_tokens
    assert tokenizer.special_ids == small.special_ids
    for text in [*TEXTS, *CONTROL, *SHOWN, "".join(TEXTS + CONTROL)]:
        for special in (True, False):
            assert tokenizer.encode(text, special) == small.encode(text, special)
    ids = list(range(small.vocab_size))
    assert tokenizer.decode(ids, skip_special=False) == small.decode(ids, skip_special=False)


@pytest.mark.parametrize("padding", [5, 4])
def test_padding_is_no_token_also_in_the_files_of_2023(padding: int, small: Tokenizer) -> None:
    vocabulary = read_gguf_vocabulary(metadata(padding), "x.gguf")
    assert vocabulary.size == small.vocab_size
    assert vocabulary.token_bytes(small.vocab_size) is None


def swap(key: str, at: int, value: Any) -> dict[str, Any]:
    data = metadata()
    data[f"tokenizer.ggml.{key}"][at] = value
    return data


@pytest.mark.parametrize(
    "data",
    [
        {},
        metadata() | {"tokenizer.ggml.model": "llama"},
        metadata() | {"tokenizer.ggml.pre": "llama-bpe"},
        metadata() | {"tokenizer.ggml.tokens": []},
        metadata() | {"tokenizer.ggml.tokens": None},
        metadata() | {"tokenizer.ggml.token_type": [1, 1]},
        metadata() | {"tokenizer.ggml.token_type": ["1"] * len(metadata()["tokenizer.ggml.tokens"])},
        metadata() | {"tokenizer.ggml.merges": ["a b c"]},
        metadata() | {"tokenizer.ggml.merges": ["a "]},
        metadata() | {"tokenizer.ggml.merges": ["zzzz qqqq"]},
        swap("tokens", 40, "A"),
        swap("tokens", 40, "中"),
        swap("tokens", 40, 7),
        swap("tokens", -4, "<think>"),
        swap("token_type", 40, 6),
        swap("token_type", 40, 3),
    ],
)
def test_broken_vocabularies_are_refused_in_a_sentence(data: dict[str, Any]) -> None:
    with pytest.raises(BadFile, match=r"^x\.gguf: ") as error:
        read_gguf_vocabulary(data, "x.gguf")
    assert "\n" not in error.value.message and len(error.value.message) < 300


@pytest.fixture(scope="module")
def real(real_gguf: Path) -> Tokenizer:
    return load_tokenizer(real_gguf, make_config(151_936))


@pytest.mark.real
def test_the_real_vocabulary_loads_quickly_and_equals_transformers(real_gguf: Path) -> None:
    from transformers import Qwen2Tokenizer

    start = time.process_time()
    tokenizer = load_tokenizer(real_gguf, make_config(151_936))
    assert time.process_time() - start < 3  # 1.3 s on the machine that wrote this
    assert (tokenizer.vocab_size, tokenizer.eos_ids) == (151_665, (151_643, 151_645))

    data = read_gguf_header(real_gguf, arrays=True).metadata
    vocab = {text: i for i, text in enumerate(data["tokenizer.ggml.tokens"][:151_643])}
    merges = [tuple(merge.split(" ")) for merge in data["tokenizer.ggml.merges"]]
    oracle = Qwen2Tokenizer(vocab=vocab, merges=merges)
    for text in TEXTS:
        ids = oracle.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == oracle.decode(ids, clean_up_tokenization_spaces=False)
    ids = tokenizer.encode("<|im_end|><tool_call>", allow_special=True)
    assert ids == [151_645, 151_657]
    assert tokenizer.decode(ids) == "<tool_call>"


@pytest.mark.real
def test_qwen1_and_qwen2_share_their_words(real: Tokenizer, qwen1: Tokenizer) -> None:
    """Two files and two libraries: the same ids for the same text."""
    for text in [*TEXTS, "".join(TEXTS)]:
        assert real.encode(text) == qwen1.encode(text)


@pytest.mark.real
@pytest.mark.parametrize(("unit", "count"), [("a", 10**6), (" ", 10**6), ("😀", 10**5), ("\u0301", 10**5)])
def test_long_runs_round_trip(real: Tokenizer, unit: str, count: int) -> None:
    text = unit * count + "x"
    assert real.decode(real.encode(text)) == text
