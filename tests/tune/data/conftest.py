"""Tokenizers: the released Qwen-1 vocabulary, a small one without a template, and that one with two templates."""

import pytest
from chat.templates import QWEN3, QWEN25
from fixtures_tokenizer import qwen1, qwen_tiktoken, real_gguf, small, small_folder
from tune.data.templated import with_template

__all__ = ["qwen1", "qwen_tiktoken", "real_gguf", "small", "small_folder"]


@pytest.fixture(scope="session")
def qwen25(small_folder, tmp_path_factory):
    return with_template(small_folder, tmp_path_factory, QWEN25)


@pytest.fixture(scope="session")
def qwen3(small_folder, tmp_path_factory):
    return with_template(small_folder, tmp_path_factory, QWEN3)


@pytest.fixture
def write(tmp_path):
    """Write a data file; the path as a text."""

    def make(content, name="data.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return make
