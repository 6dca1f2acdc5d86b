"""Vocabulary: what every tokenizer file boils down to, and the byte-level BPE that Qwen2 and later files describe."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from qwenfit.errors import BadFile, missing_extra

# How every Qwen cuts text into words before BPE; digits stand alone (tokenization_qwen.py of the Qwen-72B release,
# and the Split pre-tokenizer of the Qwen2 to Qwen3 tokenizer.json).
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class AddedToken(NamedTuple):
    """A token that BPE never produces: plain text reaches it only where the caller asks for it."""

    text: str
    id: int
    control: bool  # True: not part of the text (<|im_end|>); False: shown when decoded (<tool_call>)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one file. `encode` maps ordinary text to ids and can never return an id of `added`."""

    encode: Callable[[str], list[int]]
    token_bytes: Callable[[int], bytes | None]  # None: the id has no text
    size: int  # one above the last id with a text; higher embedding rows are padding
    num_texts: int  # ids that have a text; below `size` when there are gaps
    added: tuple[AddedToken, ...]
    normalize: Callable[[str], str]  # applied to the whole text before added tokens are looked for


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def unchanged(text: str) -> str:
    return text


def byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in character -> its byte (bytes_to_unicode in encoder.py of openai/gpt-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


def byte_level_bpe(
    tokens: dict[str, int], merges: list[tuple[str, str]], added: Iterable[AddedToken], where: str, use_nfc: bool = True
) -> Vocabulary:
    """A byte-level BPE vocabulary with Qwen2's word pattern.

    `tokens` are written in the byte-level alphabet, `merges` in order of priority. Raises BadFile, naming `where`, when
    ids clash, a byte has no token, or a merge names a token that is not there.
    """
    added = tuple(added)
    _check_tokens(tokens, added, where)
    encode = _bpe_encoder(tokens, merges, where, use_nfc)
    alphabet = byte_level_alphabet()
    by_id = {i: text for text, i in tokens.items()}
    added_bytes = {token.id: token.text.encode() for token in added}

    def token_bytes(token_id: int) -> bytes | None:
        if token_id in added_bytes:
            return added_bytes[token_id]
        text = by_id.get(token_id)
        return None if text is None else bytes([alphabet[c] for c in text])

    size = 1 + max(max(by_id), max(added_bytes, default=0))
    num_texts = len(by_id.keys() | added_bytes.keys())
    return Vocabulary(encode, token_bytes, size, num_texts, added, normalize=unchanged)


def _check_tokens(tokens: dict[str, int], added: tuple[AddedToken, ...], where: str) -> None:
    alphabet = byte_level_alphabet()
    used = set("".join(tokens))
    if foreign := used - alphabet.keys():
        raise BadFile(f"{where}: a token contains {min(foreign)!r}, so this is not a byte-level vocabulary.")
    if absent := [b for c, b in alphabet.items() if c not in tokens]:
        raise BadFile(f"{where}: the byte 0x{absent[0]:02x} has no token, so some text could not be encoded.")
    check_ids(tokens, added, where)


def check_ids(tokens: dict[Any, int], added: tuple[AddedToken, ...], where: str) -> None:
    """Raises BadFile unless all ids are different whole numbers from 0 and below 2**31, and all added texts differ."""
    ids: list[Any] = [*tokens.values(), *(token.id for token in added)]
    if set(map(type, ids)) != {int} or not 0 <= min(ids) <= max(ids) < 2**31:
        raise BadFile(f"{where}: a token id is not a whole number from 0 to 2**31.")
    if len(set(ids)) < len(ids):
        raise BadFile(f"{where}: two tokens have the same id.")
    texts = {token.text for token in added}
    if len(texts) < len(added) or "" in texts:
        raise BadFile(f"{where}: an added token is empty or listed twice.")


def _bpe_encoder(
    tokens: dict[str, int], merges: list[tuple[str, str]], where: str, use_nfc: bool
) -> Callable[[str], list[int]]:
    try:
        from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
        from tokenizers.models import BPE
    except ImportError:
        raise missing_extra("tokenizers", "run") from None
    stray = next((a + b for a, b in merges if a + b not in tokens), None)
    if stray is not None:  # the library panics where such a text is longer than every token
        raise BadFile(f"{where}: a merge makes {stray[:40]!r}, which is no token.")
    try:
        # No added tokens are registered here: that is what keeps plain text from ever becoming one.
        tokenizer = Tokenizer(BPE(vocab=tokens, merges=merges))
    except Exception as error:  # the library raises bare Exception
        raise BadFile(f"{where}: the merges do not fit the vocabulary ({str(error)[:120]}).") from None
    if use_nfc:
        tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)
