"""Tokenizer fixtures, shared with tests/chat."""

from fixtures_tokenizer import qwen1, qwen_tiktoken, real_gguf, small, small_folder

__all__ = ["qwen1", "qwen_tiktoken", "real_gguf", "small", "small_folder"]
