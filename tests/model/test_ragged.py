"""A step may mix prompt chunks and decoding sequences of any lengths: each gets what it gets alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model.util import Paged, load_config, max_error, random_model

from qwenfit.config import ModelConfig
from qwenfit.kernels.attention import LayerCache, RaggedStep, paged_attention, paged_attention_reference, write_kv
from qwenfit.kernels.kv_quant import quantize_kv

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = [
    load_config(GOLDEN / "qwen1" / "a_ntk_logn"),
    load_config(GOLDEN / "qwen2_qwen3" / "qwen2_yarn"),
    load_config(GOLDEN / "qwen2_qwen3" / "qwen3_tied"),
]


def cut(ids: list[int], rng: random.Random) -> list[list[int]]:
    """A sequence as an engine may feed it: chunks of its prompt, then single tokens."""
    prompt = rng.randint(1, len(ids))
    parts, start = [], 0
    while start < prompt:
        size = rng.randint(1, min(40, prompt - start))
        parts.append(ids[start : start + size])
        start += size
    return parts + [[token] for token in ids[prompt:]]


@settings(max_examples=60, deadline=None)
@given(config=st.sampled_from(CONFIGS), seed=st.integers(0, 2**20), count=st.integers(2, 6))
def test_in_a_mix_as_alone(config: ModelConfig, seed: int, count: int) -> None:
    rng = random.Random(seed)
    model = random_model(config, seed)
    sequences = [[rng.randrange(config.vocab_size) for _ in range(rng.randint(1, 150))] for _ in range(count)]
    mixed = Paged(model, 2048)
    waiting = {str(i): cut(ids, rng) for i, ids in enumerate(sequences)}
    got: dict[str, list[torch.Tensor]] = {name: [] for name in waiting}
    while waiting:
        names = rng.sample(sorted(waiting), rng.randint(1, len(waiting)))
        parts = [(name, waiting[name].pop(0)) for name in names]
        chunks = [mixed.chunk(name, part, prompt_length=len(sequences[int(name)])) for name, part in parts]
        rows = mixed.run(*chunks).split([len(part) for _, part in parts])
        for (name, _), row in zip(parts, rows, strict=True):
            got[name].append(row)
        waiting = {name: rest for name, rest in waiting.items() if rest}
    for i, ids in enumerate(sequences):
        alone = Paged(model, 256, scatter=False)
        expected = alone.run(alone.chunk("s", ids))
        logits = torch.cat(got[str(i)])
        assert max_error(logits, expected) < 1e-4
        clear = expected.topk(2).values.diff().abs().squeeze(-1) > 1e-3
        assert torch.equal(logits.argmax(-1)[clear], expected.argmax(-1)[clear])


@settings(max_examples=60, deadline=None)
@given(config=st.sampled_from(CONFIGS), wanted=st.lists(st.sampled_from(["last", "all", "none"]), min_size=1))
def test_what_is_not_wanted_changes_nothing(config: ModelConfig, wanted: list[str]) -> None:
    """The last layer computes the wanted rows alone; the cache gets all keys and values."""
    rng = random.Random(len(wanted))
    model = random_model(config, 1)
    parts = [[rng.randrange(config.vocab_size) for _ in range(rng.randint(1, 40))] for _ in wanted]
    all_rows, some = Paged(model, 4096), Paged(model, 4096)
    expected = all_rows.run(*(all_rows.chunk(str(i), part) for i, part in enumerate(parts)))
    kept = {"last": lambda rows: rows[-1:], "all": lambda rows: rows, "none": lambda rows: rows[:0]}
    each = expected.split([len(part) for part in parts])
    expected = torch.cat([kept[which](rows) for which, rows in zip(wanted, each, strict=True)])
    got = some.run(*(some.chunk(str(i), part, logits=wanted[i]) for i, part in enumerate(parts)))
    assert got.shape == expected.shape and (len(got) == 0 or max_error(got, expected) < 1e-4)
    for one, other in zip(some.cache.layers, all_rows.cache.layers, strict=True):
        assert torch.equal(one.key, other.key) and torch.equal(one.value, other.value)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([4, 16, 24, 64, 128]),
    quantized=st.booleans(),
    native=st.booleans(),
)
def test_attention_equals_its_definition(
    seed: int, kv_heads: int, group: int, head_dim: int, quantized: bool, native: bool
) -> None:
    """Both ways of the CPU: the C kernels serve where no gradient is wanted, PyTorch everywhere."""
    with torch.inference_mode(native):
        check_attention(random.Random(seed), kv_heads, group, head_dim, quantized)


def check_attention(rng: random.Random, kv_heads: int, group: int, head_dim: int, quantized: bool) -> None:
    torch.manual_seed(rng.randrange(2**20))
    block_size, num_blocks = rng.choice([1, 4, 16]), 64
    cache = filled_cache(num_blocks, block_size, kv_heads, head_dim, quantized)
    context_lens = [rng.randint(1, 3 * block_size) for _ in range(rng.randint(1, 4))]
    query_lens = [rng.choice([1, rng.randint(1, n), n]) for n in context_lens]
    # Some sequences own blocks that follow each other, some do not.
    free = rng.choice([list(range(num_blocks)), rng.sample(range(num_blocks), num_blocks)])
    tables = [[free.pop(0) for _ in range(3)] for _ in context_lens]
    slots = [
        tables[i][p // block_size] * block_size + p % block_size
        for i, (queries, context) in enumerate(zip(query_lens, context_lens, strict=True))
        for p in range(context - queries, context)
    ]
    step = RaggedStep(
        query_lens,
        context_lens,
        torch.tensor(tables, dtype=torch.int32),
        torch.tensor(slots),
        block_size,
        torch.float32,
    )
    k, v = torch.randn(2, len(slots), kv_heads, head_dim)
    before = cache.key.clone()
    write_kv(cache, k, v, step)
    untouched = torch.ones(num_blocks * block_size, dtype=torch.bool).index_fill(0, step.slots, False)
    assert torch.equal(cache.key.flatten(0, 1)[untouched], before.flatten(0, 1)[untouched])
    stored = quantize_kv(v)[0] if quantized else v
    assert torch.equal(cache.value.flatten(0, 1)[step.slots], stored)
    q = torch.randn(len(slots), kv_heads * group, head_dim)
    ours = paged_attention(q, cache, step, head_dim**-0.5)
    assert max_error(ours, paged_attention_reference(q, cache, step, head_dim**-0.5)) < 1e-5


def filled_cache(num_blocks: int, block_size: int, kv_heads: int, head_dim: int, quantized: bool) -> LayerCache:
    """A cache in which every slot holds something, so that reading a wrong one shows."""
    key, value = torch.randn(2, num_blocks, block_size, kv_heads, head_dim)
    if not quantized:
        return LayerCache(key, value)
    (kq, key_affine), (vq, value_affine) = quantize_kv(key), quantize_kv(value)
    return LayerCache(kq, vq, key_affine, value_affine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_follows_float32(dtype: torch.dtype) -> None:
    """The same weights in 16 bits: logits of standard deviation about 2 move by a rounding error, no more."""
    for config in CONFIGS:
        model = random_model(config, seed=1)
        ids = [random.Random(i).randrange(config.vocab_size) for i in range(100)]
        wide = Paged(model, 128)
        expected = wide.feed("s", ids[:70], ids[70:])
        model.to(dtype).dtype = dtype
        narrow = Paged(model, 128, "bf16" if dtype == torch.bfloat16 else "fp16")
        logits = narrow.feed("s", ids[:70], ids[70:])
        assert logits.dtype == torch.float32
        assert (logits - expected).abs().mean() < (0.15 if dtype == torch.bfloat16 else 0.02)
