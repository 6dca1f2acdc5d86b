"""The vocabulary in a GGUF header: tokens, their types and the merges (keys tokenizer.ggml.*)."""

from __future__ import annotations

from typing import Any

from qwenfit.checkpoint.tokenizer_json import check_pairs
from qwenfit.checkpoint.vocabulary import AddedToken, Vocabulary, byte_level_bpe
from qwenfit.errors import BadFile

# Token types of the GGUF specification (ggml-org/ggml docs/gguf.md, tokenizer.ggml.token_type).
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def read_gguf_vocabulary(metadata: dict[str, Any], where: str) -> Vocabulary:
    """The vocabulary of a GGUF header's metadata. Raises BadFile, naming `where`, when it is not a Qwen2-style BPE.

    Rows above the real tokens are filled with `[PAD<id>]` by the converter, of type unused (of type user-defined in
    files of 2023); those are padding and have no text here.
    """
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        raise BadFile(
            f"{where}: the vocabulary is of kind {str(metadata.get('tokenizer.ggml.model'))[:40]!r}, not BPE."
        )
    if metadata.get("tokenizer.ggml.pre", "qwen2") != "qwen2":
        raise BadFile(f"{where}: the pre-tokenizer {str(metadata['tokenizer.ggml.pre'])[:40]!r} is not Qwen's.")
    texts = _array(metadata, "tokens", str, where)
    types = _array(metadata, "token_type", int, where)
    merges = check_pairs([tuple(merge.split(" ")) for merge in _array(metadata, "merges", str, where)], where)
    if len(types) != len(texts):
        raise BadFile(f"{where}: {len(texts)} tokens but {len(types)} token types.")

    tokens: dict[str, int] = {}
    added: list[AddedToken] = []
    for token_id, (text, kind) in enumerate(zip(texts, types, strict=True)):
        if kind == NORMAL:
            if text in tokens:
                raise BadFile(f"{where}: token {token_id} has the same text as token {tokens[text]}.")
            tokens[text] = token_id
        elif kind in (CONTROL, USER_DEFINED) and text != f"[PAD{token_id}]":
            added.append(AddedToken(text, token_id, control=kind == CONTROL))
        elif kind not in (CONTROL, USER_DEFINED, UNUSED):
            raise BadFile(f"{where}: token {token_id} is of type {kind}, which no byte-level vocabulary has.")
    return byte_level_bpe(tokens, merges, added, where)


def _array(metadata: dict[str, Any], name: str, kind: type, where: str) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, list) or set(map(type, values)) - {kind}:
        raise BadFile(f"{where}: tokenizer.ggml.{name} is missing or not a list of {kind.__name__}.")
    return values
