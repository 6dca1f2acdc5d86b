"""As test_any_order, with the real network at tiny size, in float32, with dynamic NTK and LogN on."""

from __future__ import annotations

from collections import Counter

import torch
from fakes import assert_empty, bytes_of, penalise, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from play import CASES, arrivals, assert_everything_happened, check_answers, drive, run_settings, sizes

from qwenfit.engine.engine import Engine
from qwenfit.engine.params import SamplingParams
from qwenfit.model.batch import Chunk, make_batch
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.transformer import Transformer

SEEN: Counter[str] = Counter()


def tiny_transformer() -> tuple[Transformer, object]:
    torch.manual_seed(0)
    config = tiny_config()
    model = Transformer(config, torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.3)
    return model, config


def real_engine(model, config, *, num_blocks, block_size, swap_blocks=0, **options) -> Engine:
    cache = KVCache(config, num_blocks, block_size, "fp32")
    for layer in cache.layers:  # stale memory must never be read
        layer.key.fill_(torch.nan)
        layer.value.fill_(torch.nan)
    return Engine(model, config, cache, None, swap_bytes=bytes_of(cache, swap_blocks), **options)


NETWORK = tiny_transformer()
ALONE: dict[tuple, list[int]] = {}


@torch.inference_mode()
def network_alone(prompt: list[int], params: SamplingParams, _=0) -> list[int]:
    """The network's greedy answer, the prompt whole, in one block of a cache of its own, without the engine."""
    model, config = NETWORK
    penalties = params.repetition_penalty, params.frequency_penalty, params.presence_penalty
    answer = ALONE.setdefault((*prompt, penalties), [])
    if not answer:
        cache = KVCache(config, 1, 256, "fp32")
        new, alpha = list(prompt), config.ntk_alpha(len(prompt))
        while len(answer) < 20:
            cached = len(prompt) + len(answer) - len(new)
            batch = make_batch([Chunk(new, cached, [0], alpha)], 256)
            logits = model.logits(model.forward(batch, cache)[-1:])[0]
            new = [int(penalise(logits, prompt, answer, params).argmax())]
            answer += new
    return answer[: params.max_tokens]


@settings(run_settings, max_examples=max(CASES // 5, 10))
@given(sizes, st.lists(arrivals, min_size=2, max_size=8))
def test_the_network_gives_every_answer_as_alone(options, requests):
    engine = real_engine(*NETWORK, **options)
    check_answers(drive(engine, requests, SEEN), network_alone, SEEN)
    assert_empty(engine)


def test_everything_happened():
    assert_everything_happened(SEEN)
