from __future__ import annotations

import pytest
import torch

from tests.kernels.triton_cases import DEVICE, error, poisoned, random

pytest.importorskip("triton")
from qwenfit.kernels.attention import LayerCache
from qwenfit.kernels.kv_quant import dequantize_kv, quantize_kv
from qwenfit.kernels.triton import decode_attention as decode_attention_module
from qwenfit.kernels.triton.decode_attention import (
    NewTokens,
    contexts_in_parts,
    decode_attention,
    decode_attention_reference,
    decode_step_attention,
)
from qwenfit.kernels.triton.parts import cut, cut_reference
from qwenfit.kernels.triton.rotary_cache import embed_with_angles, rotary_cache, rotary_cache_reference
from qwenfit.model.rotary import inverse_frequencies, logn_scale
from qwenfit.planning.stack import MANY_REQUESTS

BLOCK_SIZE = 4
TINY = {"tokens": 16, "warps": 1}


def filled(kv_heads: int, head_dim: int, num_blocks: int, quantized: bool) -> LayerCache:
    shape = (num_blocks, BLOCK_SIZE, kv_heads, head_dim)
    key, value = random(*shape), random(*shape, seed=1) + 0.5
    if not quantized:
        return LayerCache(key, value)
    (key, key_affine), (value, value_affine) = quantize_kv(key), quantize_kv(value)
    return LayerCache(key, value, key_affine, value_affine)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(3, 3, 16), (6, 2, 32), (4, 1, 16), (2, 2, 20), (2, 2, 80)]
)
@pytest.mark.parametrize(("splits", "stages"), [(1, 1), (4, 1), (4, 3)])
def test_one_query_per_sequence(
    heads: int, kv_heads: int, head_dim: int, quantized: bool, splits: int, stages: int
) -> None:
    lengths = [1, 37, 0, 16]
    cache = filled(kv_heads, head_dim, 40, quantized)
    tables = torch.randperm(40, generator=torch.Generator().manual_seed(0))[:40].view(4, 10).int().to(DEVICE)
    context = torch.tensor(lengths, device=DEVICE)
    q = random(4, heads, head_dim)
    out = poisoned(4, heads * head_dim)
    config = TINY | {"stages": stages}
    decode_attention(q, cache, tables, context, 0.3, out=out, splits=splits, config=config)
    reference = decode_attention_reference(q, cache, tables, context, 0.3)
    assert error(out, reference) < (1e-4 if quantized else 1e-5)  # a query is rounded to 16 bits for bytes of keys
    assert bool((out[2] == 0).all())  # a padding row


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "half"), [(2, 2, False), (6, 2, False), (6, 2, True)])
def test_a_long_sequence_among_short_ones(heads: int, kv_heads: int, half: bool, quantized: bool) -> None:
    """It has more parts than are merged at once, and most others have one."""
    lengths, dim = [5, 340, 0, 16, 1, 40, 2], 64
    cache = filled(kv_heads, dim, 100, quantized)
    tables = torch.randint(0, 100, (len(lengths), 85), generator=torch.Generator().manual_seed(0)).int().to(DEVICE)
    context = torch.tensor(lengths, device=DEVICE)
    q = random(len(lengths), heads, dim)
    q = q.half() if half else q
    parts = contexts_in_parts(context, heads, cache, config=TINY, splits=7)
    assert parts.table is not None and int(parts.table[:, 4].max()) == 22
    out = poisoned(*q.flatten(1).shape).to(q.dtype)
    decode_attention(q, cache, tables, context, 0.3, out=out, splits=7, config=TINY)
    reference = decode_attention_reference(q.float(), cache, tables, context, 0.3)
    assert error(out.float(), reference) < (3e-3 if half else 1e-4 if quantized else 1e-5)


@pytest.mark.parametrize(
    ("lengths", "wanted"),
    [([1], 3), ([0, 0], 1), ([5, 700, 0, 16], 8), ([3] * 40, 4), ([1000, 1] * 20, 64), (list(range(256)), 16)],
)
def test_contexts_are_cut_into_parts_of_like_length(lengths: list[int], wanted: int) -> None:
    context = torch.tensor(lengths, device=DEVICE)
    table = cut(context, wanted, 16)
    assert torch.equal(table, cut_reference(context, wanted, 16))
    row, start, stop = table[:, :3].T.tolist()
    tokens = [(i, t) for i, begin, end in zip(row, start, stop, strict=True) for t in range(begin, end)]
    assert sorted(tokens) == [(i, t) for i, length in enumerate(lengths) for t in range(length)]


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 64), (7, 1, 128)])
@pytest.mark.parametrize(("splits", "stages"), [(1, 1), (4, 1), (4, 3)])
def test_codes_are_multiplied_as_they_are(heads: int, kv_heads: int, head_dim: int, splits: int, stages: int) -> None:
    """Of 16-bit models; values of very different sizes, and queries far from 1."""
    cache = filled(kv_heads, head_dim, 40, True)
    assert cache.value_affine is not None
    cache.value_affine[..., 0] *= torch.exp(3 * random(40, BLOCK_SIZE, kv_heads, seed=2))
    tables = torch.randperm(40, generator=torch.Generator().manual_seed(0)).view(4, 10).int().to(DEVICE)
    context = torch.tensor([1, 37, 0, 16], device=DEVICE)
    for size in (1e-3, 1.0, 30.0):
        q = (random(4, heads, head_dim) * size).half()
        out = poisoned(4, heads * head_dim).half()
        config = TINY | {"stages": stages}
        decode_attention(q, cache, tables, context, 0.3, out=out, splits=splits, config=config)
        reference = decode_attention_reference(q.float(), cache, tables, context, 0.3)
        assert error(out.float(), reference) < 3e-3  # the weights of values are rounded to 11 bits
        assert bool((out[2] == 0).all())


@pytest.mark.parametrize("norms", [False, True])
def test_the_newest_token_of_a_16_bit_model_joins_codes(norms: bool) -> None:
    heads, kv_heads, dim, lengths = 6, 2, 64, [1, 33, 0, 16, 39]
    ours, theirs = filled(kv_heads, dim, 50, True), filled(kv_heads, dim, 50, True)
    tables = torch.randperm(50, generator=torch.Generator().manual_seed(0)).view(5, 10).int().to(DEVICE)
    context = torch.tensor(lengths, device=DEVICE)
    places = [int(tables[i, (n - 1) // 4]) * 4 + (n - 1) % 4 if n else -1 for i, n in enumerate(lengths)]
    slots = torch.tensor(places, device=DEVICE)
    qkv = random(5, heads + 2 * kv_heads, dim).half()
    cos, sin, scale = random(5, 1, dim), random(5, 1, dim, seed=1), (random(5, 1, 1) * 0.1 + 1).half()
    head_norms = ((random(dim) * 0.1 + 1).half(), (random(dim, seed=1) * 0.1 + 1).half()) if norms else None
    for splits in (1, 2):
        out = poisoned(5, heads * dim).half()
        new = NewTokens(cos, sin, scale, head_norms, 1e-6, slots)
        decode_step_attention(qkv, new, ours, tables, context, 0.3, out=out, splits=splits, config=TINY)
        q = rotary_cache_reference(qkv, cos, sin, scale, head_norms, 1e-6, slots, theirs)
        reference = decode_attention_reference(q.float(), theirs, tables, context, 0.3)
        assert error(out.float(), reference) < 5e-3
        assert (ours.key.float() - theirs.key.float()).abs().max() <= 1  # a tie may be rounded the other way
        assert (ours.value.float() - theirs.value.float()).abs().max() <= 1


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_small_values_are_not_lost_beside_the_newest_token(spread: float, offset: float) -> None:
    """A thousand cached tokens weigh as much as the newest; every fifth value is constant, which has no spread."""
    kv_heads, group, dim, count = 1, 4, 64, 1000
    values = random(250, BLOCK_SIZE, kv_heads, dim) * spread + offset
    values[::5] = values[::5, :, :, :1]
    (key, key_affine), (value, value_affine) = quantize_kv(random(250, BLOCK_SIZE, kv_heads, dim)), quantize_kv(values)
    ours = LayerCache(key, value, key_affine, value_affine)
    theirs = LayerCache(*(x.clone() for x in (key, value, key_affine, value_affine)))
    tables = torch.arange(250, device=DEVICE).int()[None]
    context, slots = torch.tensor([count], device=DEVICE), torch.tensor([count - 1], device=DEVICE)
    qkv = random(1, group + 2, dim)
    qkv[:, :group] *= 0.3
    qkv[:, group] = qkv[:, :group].mean(1) * 8  # a key whose score is about log(1000)
    qkv[:, group + 1] = random(1, dim, seed=9) * spread + offset
    cos, sin = torch.ones(1, 1, dim, device=DEVICE), torch.zeros(1, 1, dim, device=DEVICE)
    new = NewTokens(cos, sin, None, None, 1e-6, slots)
    out = poisoned(1, group * dim)
    decode_step_attention(qkv.half(), new, ours, tables, context, 0.3, out=out, splits=1, config=TINY)
    q = rotary_cache_reference(qkv.half(), cos, sin, None, None, 1e-6, slots, theirs)
    reference = decode_attention_reference(q.float(), theirs, tables, context, 0.3)
    assert error(out, reference) < 1e-3
    mean = reference.mean()
    assert spread < 1e-3 or error(out - mean, reference - mean) < 2e-2


def test_scores_of_hundreds_do_not_overflow() -> None:
    cache = filled(2, 16, 4, False)
    cache.key.mul_(100)
    tables, context, q = torch.arange(4, device=DEVICE).int()[None], torch.tensor([16], device=DEVICE), random(1, 2, 16)
    out = decode_attention(q, cache, tables, context, 1.0, splits=2, config=TINY)
    assert error(out, decode_attention_reference(q, cache, tables, context, 1.0)) < 1e-5


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 1)])
def test_rotation_and_cache_write(heads: int, kv_heads: int, norms: bool, quantized: bool) -> None:
    tokens, dim = 5, 16
    qkv = random(tokens, heads + 2 * kv_heads, dim)
    cos, sin = random(tokens, 1, dim), random(tokens, 1, dim, seed=1)
    scale = random(tokens, 1, 1) + 2
    head_norms = (random(dim) * 0.1 + 1, random(dim, seed=1) * 0.1 + 1) if norms else None
    slots = torch.tensor([3, 0, 11, -1, 6], device=DEVICE)
    ours, theirs = filled(kv_heads, dim, 3, quantized), filled(kv_heads, dim, 3, quantized)
    out = poisoned(tokens, heads, dim)
    rotary_cache(qkv, cos, sin, scale, head_norms, 1e-6, slots, ours, out=out)
    reference = rotary_cache_reference(qkv, cos, sin, scale, head_norms, 1e-6, slots, theirs)
    assert error(out, reference) < 1e-6
    for mine, expected in ((ours.key, theirs.key), (ours.value, theirs.value)):
        difference = (mine.float() - expected.float()).abs().max()
        assert difference <= (1 if quantized else 1e-5)  # a tie may be rounded the other way
    if ours.key_affine is not None and theirs.key_affine is not None:
        assert torch.allclose(ours.key_affine, theirs.key_affine, rtol=1e-5)
        restored = dequantize_kv(ours.key, ours.key_affine, torch.float32)
        assert error(restored, dequantize_kv(theirs.key, theirs.key_affine, torch.float32)) < 2e-3


def test_embedding_and_angles_of_decoding_tokens() -> None:
    positions = torch.tensor([0, 9, 40], device=DEVICE)
    inverse = torch.stack([inverse_frequencies(16, 1e4, alpha) for alpha in (1.0, 3.0, 7.0)]).to(DEVICE)
    cos, sin, factor = poisoned(3, 1, 16), poisoned(3, 1, 16), poisoned(3, 1, 1)
    ids, table, out = torch.tensor([4, 0, 2], device=DEVICE), random(5, 1030), poisoned(3, 1030)
    embed_with_angles(ids, table, positions, inverse, 1.5, 20, (cos, sin, factor), out)
    assert torch.equal(out, table[ids])
    radians = positions[:, None].double() * inverse.double()
    assert torch.allclose(cos[:, 0, :8].double(), radians.cos() * 1.5, atol=1e-5)
    assert torch.allclose(sin[:, 0, :8].double(), -radians.sin() * 1.5, atol=1e-5)
    assert torch.equal(cos[..., 8:], cos[..., :8]) and torch.equal(sin[..., 8:], -sin[..., :8])
    assert torch.allclose(factor.flatten(), logn_scale(positions, 20))


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "splits", "dim", "warps"),
    [(2, 2, 4, 16, 1), (2, 2, 4, 16, 2), (2, 2, 4, 20, 4), (2, 2, 2, 80, 4), (6, 2, 2, 16, 1), (2, 2, 1, 16, 2)],
)
def test_the_newest_token_joins_its_sequence(
    heads: int, kv_heads: int, splits: int, dim: int, warps: int, norms: bool, quantized: bool
) -> None:
    lengths, config = [1, 33, 0, 16], TINY | {"warps": warps}
    ours, theirs = filled(kv_heads, dim, 40, quantized), filled(kv_heads, dim, 40, quantized)
    tables = torch.randperm(40, generator=torch.Generator().manual_seed(0)).view(4, 10).int().to(DEVICE)
    context = torch.tensor(lengths, device=DEVICE)
    places = [int(tables[i, (n - 1) // 4]) * 4 + (n - 1) % 4 if n else -1 for i, n in enumerate(lengths)]
    slots = torch.tensor(places, device=DEVICE)
    qkv = random(4, heads + 2 * kv_heads, dim)
    cos, sin, scale = random(4, 1, dim), random(4, 1, dim, seed=1), random(4, 1, 1) * 0.1 + 1
    head_norms = (random(dim) * 0.1 + 1, random(dim, seed=1) * 0.1 + 1) if norms else None
    out = poisoned(4, heads * dim)
    new = NewTokens(cos, sin, scale, head_norms, 1e-6, slots)
    parts = contexts_in_parts(context, heads, ours, None, config, splits)
    decode_step_attention(qkv, new, ours, tables, context, 0.3, out=out, parts=parts)
    assert parts.arrived is None or not parts.arrived.any()  # ready for the next layer
    q = rotary_cache_reference(qkv, cos, sin, scale, head_norms, 1e-6, slots, theirs)
    reference = decode_attention_reference(q, theirs, tables, context, 0.3)
    assert error(out, reference) < (5e-3 if quantized else 1e-5)  # a tie may be rounded the other way
    assert (ours.key.float() - theirs.key.float()).abs().max() <= (1 if quantized else 1e-5)
    assert (ours.value.float() - theirs.value.float()).abs().max() <= (1 if quantized else 1e-5)


@pytest.mark.parametrize(("quantized", "rows"), [(False, 7), (True, 3)])
def test_attention_of_many_sequences_begins_when_the_product_before_it_is_done(
    quantized: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    cache = filled(2, 16, 4, quantized)

    def options(_: torch.Tensor, beside: bool) -> dict[str, bool]:
        asked.append(beside)
        return {"OVERLAP": False}

    monkeypatch.setattr(decode_attention_module, "options", options)
    for count in (rows, rows + 1):
        context, slots = torch.ones(count, device=DEVICE), torch.full((count,), -1, device=DEVICE)
        tables = torch.zeros(count, 1, dtype=torch.int32, device=DEVICE)
        new = NewTokens(random(count, 1, 16), random(count, 1, 16), None, None, 1e-6, slots)
        parts = contexts_in_parts(context.long(), 2, cache, config=TINY)
        decode_step_attention(random(count, 6, 16), new, cache, tables, context.long(), 0.3, parts=parts)
    assert asked == [True, False]
    assert rows == MANY_REQUESTS["cache_int8" if quantized else "cache"]  # as plans have it
