"""tokenizer.json and tokenizer_config.json, as transformers reads them, from qwen.tiktoken or a GGUF vocabulary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwenfit.checkpoint.headers_gguf import read_gguf_header
from qwenfit.checkpoint.tokenizer_gguf import NORMAL, read_gguf_vocabulary
from qwenfit.checkpoint.tokenizer_tiktoken import NUM_RANKS, read_tiktoken
from qwenfit.checkpoint.vocabulary import SPLIT_PATTERN, AddedToken, byte_level_alphabet
from qwenfit.errors import BadFile

# ChatML with Qwen-1's default system prompt (make_context in qwen_generation_utils.py of the Nov-2023 release).
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder needs beside the weights: the two tokenizer files, and the ids that generation stops at."""

    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    eos_ids: list[int]
    pad_id: int


def from_tiktoken(path: Path, model_max_length: int, chat: bool) -> TokenizerFiles:
    """The files of a qwen.tiktoken. `chat`: answers end at <|im_end|> and ChatML is the template."""
    vocabulary = read_tiktoken(path)
    ranks: dict[bytes, int] = {}
    for rank in range(NUM_RANKS):
        token = vocabulary.token_bytes(rank)
        assert token is not None
        ranks[token] = rank
    letters = {byte: letter for letter, byte in byte_level_alphabet().items()}

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [(text(a), text(b)) for a, b in merges_of(ranks)]
    tokens = {text(token): rank for token, rank in ranks.items()}
    eos = "<|im_end|>" if chat else "<|endoftext|>"
    template = CHATML_TEMPLATE if chat else None
    return _files(tokens, merges, vocabulary.added, eos, "<|endoftext|>", template, model_max_length)


def from_gguf(path: Path, model_max_length: int) -> TokenizerFiles:
    """The files of a GGUF's own vocabulary, with its chat template."""
    metadata = read_gguf_header(path, arrays=True).metadata
    added = read_gguf_vocabulary(metadata, path.name).added  # checks the arrays
    kinds = metadata["tokenizer.ggml.token_type"]
    tokens = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"]) if kinds[i] == NORMAL}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    by_id = {token.id: token.text for token in added}
    eos = by_id.get(metadata.get("tokenizer.ggml.eos_token_id", -1), "<|endoftext|>")
    pad = by_id.get(metadata.get("tokenizer.ggml.padding_token_id", -1), "<|endoftext|>")
    template = metadata.get("tokenizer.chat_template")
    return _files(tokens, [(a, b) for a, b in merges], added, eos, pad, template, model_max_length)


def merges_of(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The BPE merges behind tiktoken's ranks, in order.

    A token's rank is the number of its merge, so its two parts are what merging it with the lower ranks alone leaves.
    Raises BadFile for a token that the ranks cannot make.
    """
    merges = []
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        parts = _merge_below(token, rank, ranks)
        if len(parts) != 2:
            raise BadFile(f"The token of rank {rank} cannot be merged from tokens of lower rank.")
        merges.append((parts[0], parts[1]))
    return merges


def _merge_below(token: bytes, limit: int, ranks: dict[bytes, int]) -> list[bytes]:
    """BPE of `token` by the merges of rank below `limit`: always the lowest-ranked pair first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [(ranks.get(parts[i] + parts[i + 1], limit), i) for i in range(len(parts) - 1)]
        rank, i = min(found)
        if rank >= limit:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _files(
    tokens: dict[str, int],
    merges: list[tuple[str, str]],
    added: Iterable[AddedToken],
    eos: str,
    pad: str,
    template: str | None,
    model_max_length: int,
) -> TokenizerFiles:
    added = sorted(added, key=lambda token: token.id)
    ids = {token.text: token.id for token in added}
    if missing := [text for text in (eos, pad) if text not in ids]:
        raise BadFile(f"The vocabulary has no token {missing[0]}.")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    listed = [{"id": t.id, "content": t.text, **flags, "special": t.control} for t in added]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": listed,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": tokens,
            "merges": [list(pair) for pair in merges],
        },
    }
    settings: dict[str, Any] = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"} for entry in listed
        },
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "errors": "replace",
        "model_max_length": model_max_length,
        "pad_token": pad,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    if template is not None:
        settings["chat_template"] = template
    stops = dict.fromkeys([ids[eos], *([ids["<|endoftext|>"]] if "<|endoftext|>" in ids else [])])
    return TokenizerFiles(tokenizer, settings, list(stops), ids[pad])
