from __future__ import annotations

from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
from qwenfit.bench.gpu_common import random_network, tiny
from qwenfit.engine import warm_up
from qwenfit.engine.padding import padded_sizes
from qwenfit.kernels.triton import product
from qwenfit.model.kv_cache import KVCache
from tests.kernels.test_triton_many_rows import packed_weight


@pytest.mark.parametrize("name", ["Qwen-7B", "Qwen2.5-7B"])
def test_every_product_of_a_padded_step_is_run_at_the_start(monkeypatch, name):
    config = tiny(name)
    model = random_network(config, torch.float32, "cpu")
    seen: Counter[tuple[str, int, int]] = Counter()

    def counted(kind, product, weight_at):
        def run(*tensors):
            weight, rows = tensors[weight_at], len(tensors[weight_at - 1])
            seen[kind, len(weight), rows] += 1
            return product(*tensors)

        return run

    for kind, at in (("add_product", 2), ("wide_product", 1), ("_linear", 2)):
        monkeypatch.setattr(warm_up, kind, counted(kind, getattr(warm_up, kind), at))
    cache = KVCache(config, 4000, 16, "bf16")
    warm_up.load_products(model, cache, 600, 40)
    layer = model.layers[0]
    wide = (layer.self_attn.qkv_proj, layer.mlp.gate_up_proj)
    expected = Counter(("_linear", len(linear.weight), rows) for linear in wide for rows in padded_sizes(600))
    expected += Counter(("add_product", config.hidden_size, rows) for _ in range(2) for rows in padded_sizes(600))
    expected += Counter(("wide_product", config.vocab_size, rows) for rows in padded_sizes(40))
    assert seen == expected
    warm_up.load_products(model, KVCache(config, 1, 16, "int8"), 600, 40)  # has no room for most
    assert seen.total() < 2 * expected.total()


def test_an_int4_product_of_the_fewest_rows_is_compiled_at_the_start(monkeypatch):
    """A short prompt's gate: few rows of a decoding step apply it in the product, by another kernel."""
    config = tiny("Qwen-7B")
    model = random_network(config, torch.float32, "cpu")
    linear = model.layers[0].mlp.gate_up_proj
    linear.packed, linear.weight = packed_weight(4, *linear.weight.shape, 1024, "middle"), None
    seen: list[tuple[int, int]] = []
    multiply = product.int_lanes
    monkeypatch.setattr(product, "int_lanes", lambda x, weight, *rest: seen.append((x.rows, weight.out_features))
                        or multiply(x, weight, *rest))  # fmt: skip
    warm_up.load_products(model, KVCache(config, 64, 16, "bf16"), 100, 40)
    assert seen == [(8, linear.packed.out_features)]


@pytest.mark.parametrize("name", ["Qwen-7B", "Qwen3-8B"])
def test_a_kernel_for_every_32_rows_is_compiled_at_the_start(monkeypatch, name):
    """What a Hopper takes: each product of a layer as a step asks for it, up to the last of the rows it is for."""
    config = tiny(name)
    model, seen = random_network(config, torch.bfloat16, "cpu"), []
    monkeypatch.setattr(warm_up, "takes_hopper", lambda weight, rows, dtype: dtype == torch.bfloat16)

    def product(x, weight, bias, residual, gated):
        seen.append((len(x), *weight.shape, bias is not None, residual is not None, gated))

    monkeypatch.setattr(warm_up, "product", product)
    warm_up.compile_many_rows(model, torch.device("cpu"))
    width, inner, qkv = config.hidden_size, config.intermediate_size, model.layers[0].self_attn.qkv_proj
    assert set(seen) == {
        (rows, *each)
        for rows in (64, 96, 128, 160, 192)
        for each in (
            (*qkv.weight.shape, qkv.bias is not None, False, False),
            (width, model.layers[0].self_attn.o_proj.weight.shape[1], False, True, False),
            (2 * inner, width, False, False, True),
            (width, inner, False, True, False),
        )
    }
