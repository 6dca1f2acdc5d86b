"""Tokenizers for tests: Qwen-1's own vocabulary, a small Qwen2-style one made on the spot, and a real GGUF."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qwenfit.checkpoint.tokenizer import Tokenizer, load_tokenizer
from qwenfit.config import ModelConfig

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHOWN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

TEXTS = [
    "Hello, world! I'LL DON'T we've it's 2024-01-01 3.14159\n",
    "你好，世界。他说：“今天天气不错！” 𠮷野家 ㈱ ①②③",
    "def f(x):\n\treturn {k: v**2 for k, v in x.items()}  # 注释\r\n\r\n    pass\n\n\n",
    "😀👨‍👩‍👧‍👦🇨🇳 é e\u0301 ﬁ Å Å \u1112\u1161\u11ab 한글 ça va? naïve",
    "مرحبا بالعالم שלום नमस्ते สวัสดี Привет \u200f\u202e rtl",
    "a  b   c\t\td \u00a0 \u3000 e\n \n  \n",
    " ",
    "\n",
    "",
    "\ufeffBOM",
    "x" * 300,
    "!?" * 90,
    "\x00\x1f\x7f",
]


def missing(what: str, how: str) -> None:
    """CI must run what a laptop may skip."""
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{what} is not at hand: {how}")


def make_config(vocab_size: int, architecture: str = "qwen2") -> ModelConfig:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 8}
    return ModelConfig(
        name="tiny", architecture=architecture, **sizes, intermediate_size=8, vocab_size=vocab_size,
        tie_word_embeddings=False, qkv_bias=True, qk_norm=False, rms_norm_eps=1e-6, rope_theta=1e4,
        context_length=64, training_length=64,
    )  # fmt: skip


@pytest.fixture(scope="session")
def qwen_tiktoken() -> Path:
    """The released qwen.tiktoken: PyPI's dashscope 2.0.2 carries it; the package is found, never imported."""
    named = os.environ.get("QWENFIT_TEST_TIKTOKEN")
    spec = importlib.util.find_spec("dashscope")
    packaged = Path(spec.origin).parent / "resources" / "qwen.tiktoken" if spec and spec.origin else None
    path = Path(named) if named else packaged
    if path is None or not path.is_file():
        missing("qwen.tiktoken", "pip install --no-deps dashscope==2.0.2, or set QWENFIT_TEST_TIKTOKEN")
    assert path is not None
    return path


@pytest.fixture(scope="session")
def qwen1(qwen_tiktoken: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer of a Qwen-1 chat model."""
    folder = tmp_path_factory.mktemp("qwen1")
    (folder / "qwen.tiktoken").symlink_to(qwen_tiktoken)
    (folder / "generation_config.json").write_text('{"chat_format": "chatml", "eos_token_id": 151643}')
    return load_tokenizer(folder, make_config(151_936, "qwen1"))


@cache
def small_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level BPE trained on TEXTS by the tokenizers library: token -> id, merges."""
    import json

    from tokenizers import Tokenizer as HFTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    trained = HFTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words = [*TEXTS, "system user assistant You are a helpful assistant. <|im_start|> <tool_call> think " * 3]
    trained.train_from_iterator(words * 3, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet))
    model = json.loads(trained.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


@cache
def small_transformers_tokenizer() -> Any:
    """transformers' Qwen2Tokenizer over the small vocabulary, with Qwen's added tokens: the oracle."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    vocab, merges = small_vocabulary()
    tokenizer = Qwen2Tokenizer(vocab=dict(vocab), merges=list(merges))
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in SHOWN])
    return tokenizer


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small tokenizer as transformers saves it."""
    folder = tmp_path_factory.mktemp("qwen2")
    small_transformers_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small(small_folder: Path) -> Tokenizer:
    return load_tokenizer(small_folder, make_config(1000))


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct as GGUF."""
    named = os.environ.get("QWENFIT_TEST_GGUF")
    path = Path(named) if named else Path.home() / ".cache/qwenfit-tests/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
    if not path.is_file():
        pytest.skip("the real GGUF is not at hand")
    return path
