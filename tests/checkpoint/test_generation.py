"""The sampling that a model's files recommend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwenfit.checkpoint.generation import GGUF_KEYS, published_sampling
from qwenfit.engine.params import SamplingParams
from qwenfit.errors import BadFile


def test_what_qwen2_5_recommends(tmp_path: Path) -> None:
    """generation_config.json of Qwen2.5-7B-Instruct; its end of sequence is the tokenizer's affair."""
    table = {"bos_token_id": 151643, "pad_token_id": 151643, "do_sample": True, "eos_token_id": [151645, 151643]}
    table |= {
        "repetition_penalty": 1.05,
        "temperature": 0.7,
        "top_p": 0.8,
        "top_k": 20,
        "transformers_version": "4.37.0",
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(table))
    expected = SamplingParams(repetition_penalty=1.05, temperature=0.7, top_p=0.8, top_k=20)
    assert published_sampling(tmp_path) == expected


def test_what_qwen1_chat_recommends(tmp_path: Path) -> None:
    """Its max_new_tokens of 512 is not taken over."""
    table = {"chat_format": "chatml", "max_window_size": 24000, "max_new_tokens": 512, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(table | {"top_k": 0, "top_p": 0.8}))
    assert published_sampling(tmp_path) == SamplingParams(top_p=0.8)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"do_sample": False, "temperature": None, "top_p": None}, SamplingParams(temperature=0.0)),
        ({"top_k": -1}, SamplingParams()),
        ({}, SamplingParams()),
    ],
)
def test_greedy_all_and_nothing(tmp_path: Path, table: dict[str, object], expected: SamplingParams) -> None:
    assert published_sampling(tmp_path) == SamplingParams()
    (tmp_path / "generation_config.json").write_text(json.dumps(table))
    assert published_sampling(tmp_path) == expected


@pytest.mark.parametrize("table", [{"temperature": "hot"}, {"top_p": 7}, {"top_k": 1.5}, {"repetition_penalty": 0}])
def test_the_impossible_is_a_bad_file(tmp_path: Path, table: dict[str, object]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(table))
    with pytest.raises(BadFile, match="recommends is impossible"):
        published_sampling(tmp_path)


def test_a_gguf_says_it_in_its_header(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    keys = gguf.Keys.General
    theirs = [keys.SAMPLING_TEMP, keys.SAMPLING_TOP_P, keys.SAMPLING_TOP_K, keys.SAMPLING_MIN_P]
    assert list(GGUF_KEYS.values()) == [*theirs, keys.SAMPLING_PENALTY_REPEAT]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
    writer.add_float32(keys.SAMPLING_TEMP, 0.5)
    writer.add_int32(keys.SAMPLING_TOP_K, 20)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert published_sampling(tmp_path / "m.gguf") == SamplingParams(temperature=0.5, top_k=20)
