"""Tokenizer: text to ids and back, and messages to a prompt, for every Qwen and every file its vocabulary comes in."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from qwenfit.chat import chatml
from qwenfit.chat.messages import plain_messages
from qwenfit.chat.template import ChatTemplate
from qwenfit.checkpoint.bounded import open_regular, read_json_object, shown
from qwenfit.checkpoint.detokenizer import Detokenizer
from qwenfit.checkpoint.vocabulary import AddedToken, Vocabulary
from qwenfit.config import ModelConfig
from qwenfit.errors import BadFile, NotFound, UsageError

MAX_TEMPLATE_BYTES = 1 << 20  # Qwen3's has 4 KB


class Tokenizer:
    """Text and messages to token ids, and back.

    Text never becomes a special token unless the caller asks: `<|im_end|>` typed by a user is seven ordinary tokens.
    """

    def __init__(
        self, vocabulary: Vocabulary, eos_ids: Iterable[int], chat_template: ChatTemplate | None = None
    ) -> None:
        self._vocabulary = vocabulary
        self.chat_template = chat_template
        self.special_tokens = {token.text: token.id for token in vocabulary.added}
        self.special_ids = frozenset(token.id for token in vocabulary.added if token.control)
        self.eos_ids = tuple(sorted(set(eos_ids)))  # ids that end an answer
        self.vocab_size = vocabulary.size  # rows of the embedding from here on are padding

    def encode(self, text: str, allow_special: bool | Collection[str] = False) -> list[int]:
        """Token ids of `text`. `allow_special`: which special tokens' texts become that token (True: all)."""
        text = self._vocabulary.normalize(_without_surrogates(text))
        if not allow_special:
            return self._vocabulary.encode(text)
        pattern = self._all_special if allow_special is True else _any_of(self._known(allow_special))
        ids: list[int] = []
        for i, piece in enumerate(pattern.split(text)):  # text, special, text, ..., text
            ids += [self.special_tokens[piece]] if i % 2 else self._vocabulary.encode(piece)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD. Raises UsageError for an id without text."""
        token_bytes = self._shown_bytes if skip_special else self._token_bytes
        return b"".join(map(token_bytes, ids)).decode("utf-8", "replace")

    def detokenizer(self, skip_special: bool = True) -> Detokenizer:
        """A fresh Detokenizer for one answer; control tokens show as nothing unless `skip_special` is False."""
        return Detokenizer(self._shown_bytes if skip_special else self._token_bytes)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> list[int]:
        """The prompt of a chat as token ids: by the model's template, or as ChatML where it has none.

        `kwargs` reach the template (`enable_thinking=False`). Only what the template itself writes can become a
        special token. Raises UsageError when the messages or arguments are not what the template takes, BadFile when
        the template is broken or exceeds its limits.
        """
        plain = plain_messages(messages)
        if self.chat_template is None:
            if tools or kwargs:
                named = "tools" if tools else shown(next(iter(kwargs)))
                raise UsageError(f"This model has no chat template, so it cannot take {named}.")
            return chatml.encode_messages(self, plain, add_generation_prompt)
        pieces = self.chat_template.render(plain, tools, add_generation_prompt, **kwargs)
        texts = {piece: self.encode(piece) for piece in set(pieces[::2])}  # most are the same few: "\n", "user\n"
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            ids += [self.special_tokens[piece]] if i % 2 else texts[piece]
        return ids

    @cached_property
    def textless_ids(self) -> tuple[int, ...]:
        """Ids below `vocab_size` that a vocabulary with gaps leaves without a text; nothing may draw them."""
        if self._vocabulary.num_texts == self.vocab_size:
            return ()
        return tuple(i for i in range(self.vocab_size) if self._vocabulary.token_bytes(i) is None)

    def special_id(self, text: str) -> int:
        """The id of a special token; BadFile when the vocabulary lacks it."""
        try:
            return self.special_tokens[text]
        except KeyError:
            raise BadFile(f"The vocabulary has no token {text}.") from None

    @cached_property
    def _all_special(self) -> re.Pattern[str]:
        return _any_of(self.special_tokens)

    def _known(self, texts: Collection[str]) -> Collection[str]:
        if isinstance(texts, str) or (unknown := set(texts) - self.special_tokens.keys()):
            raise UsageError(f"There is no special token {shown(texts if isinstance(texts, str) else min(unknown))}.")
        return texts

    def _token_bytes(self, token_id: int) -> bytes:
        data = self._vocabulary.token_bytes(token_id)
        if data is None:
            raise UsageError(f"Token id {token_id} has no text; this vocabulary has {self.vocab_size} tokens.")
        return data

    def _shown_bytes(self, token_id: int) -> bytes:
        return b"" if token_id in self.special_ids else self._token_bytes(token_id)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of `texts` as a group, the longest first."""
    return re.compile("(" + "|".join(map(re.escape, sorted(texts, key=len, reverse=True))) + ")")


def _without_surrogates(text: str) -> str:
    """Surrogate pairs joined, lone ones (JSON can carry them) replaced by U+FFFD, as tiktoken does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def load_tokenizer(path: str | os.PathLike[str], config: ModelConfig) -> Tokenizer:
    """The tokenizer of a checkpoint. `path`: a folder with tokenizer.json or qwen.tiktoken, a file in one, or a .gguf.

    Nothing in the folder is executed. Raises NotFound when there is no vocabulary, BadFile when it is malformed or has
    more tokens than the model has embedding rows.
    """
    path = Path(path)
    if path.suffix.lower() == ".gguf":
        tokenizer = _from_gguf(path)
    else:
        tokenizer = _from_folder(path.parent if path.is_file() else path, config)
    if tokenizer.vocab_size > config.vocab_size:
        sizes = f"{tokenizer.vocab_size} tokens and the model {config.vocab_size} rows"
        raise BadFile(f"The vocabulary of {shown(path.name)} has {sizes}.")
    return tokenizer


def _from_gguf(path: Path) -> Tokenizer:
    from qwenfit.checkpoint.headers_gguf import read_gguf_header
    from qwenfit.checkpoint.tokenizer_gguf import read_gguf_vocabulary

    metadata = read_gguf_header(path, arrays=True).metadata
    vocabulary = read_gguf_vocabulary(metadata, shown(path.name))
    names = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
    ids = {role: metadata.get(f"tokenizer.ggml.{key}") for role, key in names.items()}
    by_id = {token.id: token.text for token in vocabulary.added}
    variables = {role: by_id[i] for role, i in ids.items() if i in by_id}
    declared = [ids["eos_token"], metadata.get("tokenizer.ggml.eot_token_id")]
    source = metadata.get("tokenizer.chat_template")
    template = _template(source, vocabulary.added, variables, shown(path.name))
    return Tokenizer(vocabulary, _stop_ids(vocabulary.added, declared), template)


def _from_folder(folder: Path, config: ModelConfig) -> Tokenizer:
    from qwenfit.checkpoint.tokenizer_json import read_tokenizer_json
    from qwenfit.checkpoint.tokenizer_tiktoken import read_tiktoken

    settings = _optional_json(folder / "tokenizer_config.json")
    generation = _optional_json(folder / "generation_config.json")
    if (folder / "tokenizer.json").exists():
        vocabulary = read_tokenizer_json(folder / "tokenizer.json", settings)
    elif (folder / "qwen.tiktoken").exists():
        vocabulary = read_tiktoken(folder / "qwen.tiktoken")
    else:
        raise NotFound(
            f"There is no tokenizer.json and no qwen.tiktoken in {shown(folder)}.",
            "Copy the tokenizer's files there from the model's repository.",
        )
    if config.architecture == "qwen1" and generation.get("chat_format") == "raw":
        return Tokenizer(vocabulary, _stop_ids(vocabulary.added, [], ("<|endoftext|>",)))
    variables = _named_tokens(settings)
    by_text = {token.text: token.id for token in vocabulary.added}
    eos = generation.get("eos_token_id")
    declared = [*(eos if isinstance(eos, list) else [eos]), by_text.get(variables.get("eos_token", ""))]
    # Qwen-1's own chat() also stops where the model opens a turn of its own (get_stop_words_ids).
    usual = ("<|endoftext|>", "<|im_end|>", *(("<|im_start|>",) if config.architecture == "qwen1" else ()))
    source = _read_template(folder / "chat_template.jinja") or settings.get("chat_template")
    template = _template(source, vocabulary.added, variables, "tokenizer_config.json")
    return Tokenizer(vocabulary, _stop_ids(vocabulary.added, declared, usual), template)


def _stop_ids(
    added: Iterable[AddedToken], declared: Iterable[object], usual: Collection[str] = ("<|endoftext|>", "<|im_end|>")
) -> set[int]:
    """The ids that end an answer: those the files declare and Qwen's usual ones that the vocabulary has.

    The usual ones are needed because many published files name one of two: a chat GGUF only <|im_end|>, a base model
    only <|endoftext|>.
    """
    ids = [i for i in declared if i is not None]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise BadFile("An end-of-sequence id is not a whole number.")
    return {i for i in ids if isinstance(i, int)} | {token.id for token in added if token.text in usual}


def _template(
    source: object, added: Iterable[AddedToken], variables: dict[str, str], where: str
) -> ChatTemplate | None:
    """The model's chat template, None when it has none; of several named ones the default."""
    if isinstance(source, list):
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str) or len(source) > MAX_TEMPLATE_BYTES:
        raise BadFile(f"{where}: the chat template is not a text of at most 1 MiB.")
    return ChatTemplate(source, [token.text for token in added], variables)


def _read_template(path: Path) -> str | None:
    if not path.exists():
        return None
    with open_regular(path) as file:
        data = file.read(MAX_TEMPLATE_BYTES + 1)
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise BadFile(f"{path.name} is not UTF-8 text.") from None


def _named_tokens(settings: dict[str, Any]) -> dict[str, str]:
    """bos_token, eos_token, ... of tokenizer_config.json: given as a text or as {"content": text}."""
    found = {}
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        value = settings.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[role] = text
    return found


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.exists() else {}
