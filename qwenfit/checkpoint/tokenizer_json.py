"""tokenizer.json: the vocabulary of Qwen1.5 and later, as the `tokenizers` library writes it.

The file is data for our own pipeline, not a pipeline to run: a hostile normalizer or word pattern in it would otherwise
decide how much time and memory a text costs. What differs from Qwen's is refused.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from qwenfit.checkpoint.bounded import read_json_object
from qwenfit.checkpoint.vocabulary import SPLIT_PATTERN, AddedToken, Vocabulary, byte_level_bpe
from qwenfit.errors import BadFile

MAX_FILE_BYTES = 24 << 20  # Qwen3's has 11.4 MB
MAX_JSON_VALUES = 1_500_000  # three a token: its id and a pair of merged parts


def read_tokenizer_json(path: Path, tokenizer_config: dict[str, Any]) -> Vocabulary:
    """The vocabulary of a tokenizer.json, with the tokens that tokenizer_config.json (parsed) adds. Raises BadFile."""
    document = read_json_object(path, MAX_FILE_BYTES, MAX_JSON_VALUES)
    model = document.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise BadFile(f"{path.name} holds no BPE vocabulary.")
    _check_pipeline(document, model, path.name)
    added = _added_tokens(document, tokenizer_config, path.name)
    texts = {token.text for token in added}
    tokens = {text: i for text, i in model["vocab"].items() if text not in texts}
    normalizer = document.get("normalizer")
    return byte_level_bpe(tokens, _merges(model, path.name), added, path.name, use_nfc=normalizer is not None)


def _check_pipeline(document: dict[str, Any], model: dict[str, Any], where: str) -> None:
    """Raises BadFile unless text is cut and merged as in every released Qwen."""
    plain = not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    if model.get("type", "BPE") != "BPE" or not plain or model.get("byte_fallback") or model.get("ignore_merges"):
        raise BadFile(f"{where}: the model is not the plain BPE that Qwen uses.")
    if _kinds(document.get("normalizer")) not in (["NFC"], []):
        raise BadFile(f"{where}: the normalizer is {_kinds(document['normalizer'])}; Qwen uses NFC.")
    if _kinds(document.get("decoder")) != ["ByteLevel"]:
        raise BadFile(f"{where}: the decoder is not ByteLevel, so this is not a byte-level vocabulary.")
    steps = _steps(document.get("pre_tokenizer"))
    expected: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ]
    same = len(steps) == len(expected) and all(
        step.get(key) == value for step, want in zip(steps, expected, strict=True) for key, value in want.items()
    )
    if not same:
        raise BadFile(f"{where}: the pre-tokenizer is not the one that Qwen uses.")


def _steps(part: object) -> list[dict[str, Any]]:
    """A pipeline part as a list of its steps; a Sequence is unpacked."""
    if part is None:
        return []
    if not isinstance(part, dict):
        return [{}]
    if part.get("type") != "Sequence":
        return [part]
    inner = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
    return [step if isinstance(step, dict) else {} for step in inner] if isinstance(inner, list) else [{}]


def _kinds(part: object) -> list[str]:
    return [str(step.get("type")) for step in _steps(part)]


def _merges(model: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """Merges are ["a", "b"] pairs, or "a b" strings in files written before tokenizers 0.20."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise BadFile(f"{where} holds no merges.")
    if set(map(type, merges)) - {str, list}:
        raise BadFile(f"{where}: a merge is not a pair of tokens.")
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    return check_pairs(pairs, where)


def check_pairs(pairs: list[Any], where: str) -> list[tuple[str, str]]:
    """`pairs` itself; raises BadFile unless each is two non-empty strings."""
    parts = list(itertools.chain.from_iterable(pairs))
    if set(map(len, pairs)) - {2} or set(map(type, parts)) - {str} or "" in set(parts):
        raise BadFile(f"{where}: a merge is not a pair of tokens.")
    return pairs


def _added_tokens(document: dict[str, Any], tokenizer_config: dict[str, Any], where: str) -> list[AddedToken]:
    """Added tokens of tokenizer.json, then those that only tokenizer_config.json's added_tokens_decoder lists."""
    listed = document.get("added_tokens") or []
    extra = tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(listed, list) or not isinstance(extra, dict):
        raise BadFile(f"{where}: the added tokens are not a list.")
    added = [_added_token(entry, where) for entry in listed]
    known = set(added)
    for key, entry in extra.items():
        numbered = isinstance(entry, dict) and key.isdecimal() and len(key) < 12
        token = _added_token({**entry, "id": int(key)} if numbered else None, where)
        if token not in known:
            added.append(token)
    return added


def _added_token(entry: object, where: str) -> AddedToken:
    if not isinstance(entry, dict) or type(entry.get("content")) is not str or type(entry.get("id")) is not int:
        raise BadFile(f"{where}: an added token lacks its text or its id.")
    if not _is_unicode(entry["content"]):
        raise BadFile(f"{where}: the added token {entry['content'][:40]!a} holds half a surrogate pair.")
    if entry.get("lstrip") or entry.get("rstrip") or entry.get("single_word"):
        raise BadFile(
            f"{where}: the added token {entry['content'][:40]!r} swallows its neighbours, as none of Qwen's do."
        )
    return AddedToken(entry["content"], entry["id"], control=bool(entry.get("special")))


def _is_unicode(text: str) -> bool:
    """JSON can write half of a surrogate pair, which is no character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
