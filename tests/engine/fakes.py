"""A network without weights: the next token is a function of the history as the paged cache gives it back.

A wrong block, slot, position or alpha anywhere in a sequence's past gives a wrong token, and exactly so.
"""

from __future__ import annotations

from collections import Counter

import torch
from transformers import RepetitionPenaltyLogitsProcessor

from qwenfit.config import ModelConfig
from qwenfit.engine.engine import Engine
from qwenfit.engine.params import SamplingParams

BUCKETS = 997
ROWS = 64  # of the head
WORDS = 50  # real tokens; the rows beyond are padding, and the likeliest of all
EOS = 49
lookahead = False  # of the engines made here


def tiny_config(**changes) -> ModelConfig:
    values = {
        "name": "tiny",
        "architecture": "qwen1",
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 48,
        "vocab_size": ROWS,
        "tie_word_embeddings": False,
        "qkv_bias": True,
        "qk_norm": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "context_length": 256,
        "training_length": 16,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
    }
    return ModelConfig(**{**values, **changes})


class FakeCache:
    """Per slot: token, position and alpha."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.slots = torch.full((num_blocks * block_size, 3), -12345, dtype=torch.int64)

    @property
    def by_block(self) -> list[torch.Tensor]:
        return [self.slots.view(self.num_blocks, -1)]


class FakeModel:
    """Row p of a sequence has the bucket of its history up to p; a bucket has random logits."""

    def __init__(self, poison: int | None = None) -> None:
        self.table = torch.randn(BUCKETS, ROWS, generator=torch.Generator().manual_seed(1))
        self.table[:, WORDS:] += 100
        self.poison = poison  # a token that turns everything after it into NaN
        self.token_counts: list[int] = []  # of each step
        self.fail_with: BaseException | None = None

    def forward(self, batch, cache: FakeCache, rows: torch.Tensor | None) -> torch.Tensor:
        if self.fail_with is not None:
            error, self.fail_with = self.fail_with, None
            raise error
        assert sum(batch.query_lens) == len(batch.input_ids) == len(batch.slots)
        self.token_counts.append(len(batch.input_ids))
        alphas = torch.tensor([a for a, n in zip(batch.ntk_alphas, batch.query_lens, strict=True) for _ in range(n)])
        kept = batch.slots >= 0  # the rest is padding
        cache.slots[batch.slots[kept]] = torch.stack([batch.input_ids, batch.positions, alphas.long()], 1)[kept]
        hidden = []
        for table, queries, context in zip(batch.block_tables, batch.query_lens, batch.context_lens, strict=True):
            at = torch.arange(context)
            history = cache.slots[table[at // cache.block_size].long() * cache.block_size + at % cache.block_size]
            buckets = history_buckets(*history.unbind(1))
            if self.poison is not None:
                buckets = torch.where((history[:, 0] == self.poison).cumsum(0) > 0, -1, buckets)
            hidden.append(buckets[-queries:])
        every = torch.cat(hidden)[:, None]
        return every if rows is None else every[rows]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.table[hidden[:, 0].clamp(min=0)]
        return logits.masked_fill(hidden < 0, torch.nan)


def history_buckets(tokens: torch.Tensor, positions: torch.Tensor, alphas: torch.Tensor) -> torch.Tensor:
    at = torch.arange(len(tokens))
    terms = (tokens + 1) * (positions * 104729 + alphas * 131 + 7919) % BUCKETS * (at + 1) * (at + 3)
    return terms.cumsum(0) % BUCKETS


def penalise(logits: torch.Tensor, prompt: list[int], answer: list[int], params: SamplingParams) -> torch.Tensor:
    """Logits [vocab] as transformers' repetition penalty and OpenAI's formula for the other two change them."""
    seen = torch.tensor([[*prompt, *answer]])
    out = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(seen, logits[None].clone())[0]
    for token, count in Counter(answer).items():
        out[token] -= params.frequency_penalty * count + params.presence_penalty
    return out


def continue_alone(
    model: FakeModel, config: ModelConfig, prompt: list[int], count: int, params: SamplingParams | None = None
) -> list[int]:
    """The greedy answer of `count` tokens with the penalties of `params`, without any engine."""
    tokens = list(prompt)
    alpha = torch.tensor(int(config.ntk_alpha(len(prompt))))
    for _ in range(count):
        bucket = history_buckets(torch.tensor(tokens), torch.arange(len(tokens)), alpha.expand(len(tokens)))[-1]
        logits = model.table[bucket, :WORDS]
        if params is not None and params.penalised:
            logits = penalise(logits, prompt, tokens[len(prompt) :], params)
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


class FakeDetokenizer:
    """Token i is a word of its own; `finish` gives what a cut-off character would."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    def push(self, token: int) -> str:
        return self.words[token]

    def finish(self) -> str:
        return ""


class FakeTokenizer:
    vocab_size = WORDS
    eos_ids = (EOS,)
    textless_ids = ()

    def __init__(self) -> None:
        self.words = [chr(97 + i % 3) + "xyz"[i % 2 :][: i % 4] for i in range(WORDS)]

    def encode(self, text: str) -> list[int]:
        return [ord(c) % WORDS for c in text]

    def detokenizer(self) -> FakeDetokenizer:
        return FakeDetokenizer(self.words)

    def apply_chat_template(self, messages, tools=None, **options) -> list[int]:
        return self.encode("".join(f"{m['role']}:{m['content']}\n" for m in messages))


def fake_engine(
    num_blocks: int = 64, block_size: int = 4, model: FakeModel | None = None, swap_blocks: int = 0, **options
) -> Engine:
    cache = FakeCache(num_blocks, block_size)
    return Engine(
        model or FakeModel(),
        options.pop("config", tiny_config()),
        cache,
        options.pop("tokenizer", FakeTokenizer()),
        swap_bytes=bytes_of(cache, swap_blocks),
        **{"max_num_seqs": 8, "max_batched_tokens": 32, "lookahead": lookahead, **options},
    )


def bytes_of(cache, blocks: int) -> int:
    return blocks * sum(view[0].nbytes for view in cache.by_block)


def run_to_end(engine: Engine) -> dict[tuple[int, int], list]:
    """Step until nothing is left: the deltas of each answer, by (request id, index)."""
    made: dict[tuple[int, int], list] = {}
    while engine.has_work:
        for delta in engine.step():
            made.setdefault((delta.request_id, delta.index), []).append(delta)
    return made


def tokens_of(deltas: list) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def text_of(deltas: list) -> str:
    return "".join(delta.text for delta in deltas)


def told(made: dict[tuple[int, int], list], ids: list[int], wanted: list[SamplingParams]) -> list[tuple]:
    """All that the answers of each request tell: tokens, text, log-probabilities and what stopped them."""
    return [
        (tokens_of(answer), text_of(answer), [d.logprobs for d in answer], answer[-1].stop_reason)
        for i, params in zip(ids, wanted, strict=True)
        for answer in (made[i, k] for k in range(params.n))
    ]


def assert_empty(engine: Engine) -> None:
    """Nothing of any request is left, and every block is free."""
    scheduler = engine.scheduler
    assert not scheduler.running and not scheduler.waiting and not engine._untold and not engine._num_deadlines
    assert not engine._flights
    assert scheduler.pool.num_free == scheduler.pool.num_blocks
    assert not any(scheduler.pool._references)
    assert sorted(scheduler._rows) == list(range(scheduler.max_num_seqs))
    assert scheduler._promised == 0
    assert not scheduler._returning and not scheduler._stopped and not scheduler._out and not scheduler._back
    if engine.host is not None:
        assert sorted(engine.host.memory.free) == list(range(engine.host.memory.size))
    assert len(scheduler.pool._hash_of) == len(scheduler.pool._block_of) <= scheduler.pool.num_blocks
