"""qwen.tiktoken: the vocabulary of Qwen-1, 151,643 byte strings in order of rank, and 208 special tokens."""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from pathlib import Path

from qwenfit.checkpoint.bounded import open_regular
from qwenfit.checkpoint.vocabulary import SPLIT_PATTERN, AddedToken, Vocabulary, nfc
from qwenfit.errors import BadFile, missing_extra

# tokenization_qwen.py of the Qwen-72B release: special ids are fixed, whatever the file holds.
NUM_RANKS = 151_643
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))
MAX_FILE_BYTES = 16 << 20  # the released file has 2.6 MB

# The word pattern's `\s+(?!\S)` backtracks one step a character, and tiktoken 0.14 panics (StackOverflow) at a run of
# 999,999 whitespace characters without a line end. Longer runs are cut: ids equal the reference's wherever it has any.
WHITESPACE_RUN = 900_000
_RUN = re.compile(r"[^\S\r\n]+")


def read_tiktoken(path: Path) -> Vocabulary:
    """The vocabulary of a qwen.tiktoken file. Raises BadFile when it is not exactly Qwen's shape."""
    try:
        import tiktoken
    except ImportError:
        raise missing_extra("tiktoken", "run") from None
    ranks = _read_ranks(path)
    encoding = tiktoken.Encoding("qwen", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={})
    added = tuple(AddedToken(text, NUM_RANKS + i, control=True) for i, text in enumerate(SPECIAL_TOKENS))
    texts = sorted(ranks, key=ranks.__getitem__) + [token.text.encode() for token in added]

    def encode(text: str) -> list[int]:
        if len(text) <= WHITESPACE_RUN:
            return encoding.encode_ordinary(text)
        return [i for part in _cut_whitespace(text) for i in encoding.encode_ordinary(part)]

    def token_bytes(token_id: int) -> bytes | None:
        return texts[token_id] if 0 <= token_id < len(texts) else None

    return Vocabulary(encode, token_bytes, len(texts), len(texts), added, normalize=nfc)


def _cut_whitespace(text: str) -> list[str]:
    cuts = [0]
    for match in _RUN.finditer(text):  # whole runs: to look for long ones only would try each start of each run
        cuts += range(match.start() + WHITESPACE_RUN, match.end(), WHITESPACE_RUN)
    return [text[a:b] for a, b in itertools.pairwise([*cuts, len(text)])]


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank, one `base64 rank` a line."""
    with open_regular(path) as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise BadFile(f"{path.name} is larger than {MAX_FILE_BYTES >> 20} MiB; the released file has 2.6 MB.")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            token64, rank_text = line.split()
            token, rank = base64.b64decode(token64, validate=True), int(rank_text)
        except (ValueError, binascii.Error):
            raise BadFile(f"{where}: expected a token in base64 and its rank.") from None
        if not token or token in ranks:
            raise BadFile(f"{where}: the token is empty or listed twice.")
        if not 0 <= rank < NUM_RANKS:
            raise BadFile(f"{where}: rank {rank} clashes with the special tokens, which start at {NUM_RANKS}.")
        ranks[token] = rank
    if absent := [b for b in range(256) if bytes([b]) not in ranks]:
        raise BadFile(f"{path.name}: the byte 0x{absent[0]:02x} has no token, so some text could not be encoded.")
    if len(ranks) != NUM_RANKS or len(set(ranks.values())) != NUM_RANKS:
        raise BadFile(f"{path.name}: {len(set(ranks.values()))} different ranks; Qwen has {NUM_RANKS}, each used once.")
    return ranks
