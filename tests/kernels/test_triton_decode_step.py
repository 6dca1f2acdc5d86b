from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.kernels.triton_cases import DEVICE, error, random

pytest.importorskip("triton")
from qwenfit.config import ModelConfig
from qwenfit.kernels.triton.greedy import greedy, greedy_reference
from qwenfit.kernels.triton.int_matvec import pack_blocked, unpack_blocked
from qwenfit.model.batch import Chunk, make_batch
from qwenfit.model.decode import DecodeStep
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.linear import Linear
from qwenfit.model.transformer import Transformer
from qwenfit.quantize.rtn import quantize_rtn

QWEN1 = ModelConfig(
    name="tiny",
    architecture="qwen1",
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=96,
    vocab_size=70,
    tie_word_embeddings=False,
    qkv_bias=True,
    qk_norm=False,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    context_length=64,
    training_length=8,
    use_dynamic_ntk=True,
    use_logn_attn=True,
)
QWEN3 = replace(
    QWEN1, architecture="qwen3", num_heads=4, num_kv_heads=2, head_dim=16, qk_norm=True, qkv_bias=False,
    tie_word_embeddings=True, use_dynamic_ntk=False, use_logn_attn=False,
)  # fmt: skip


def network(config: ModelConfig) -> Transformer:
    model = Transformer(config, torch.float32, "cpu")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(values * parameter.shape[1] ** -0.5 if values.dim() == 2 else 1 + 0.1 * values)
    return model.requires_grad_(False)


def quantised(model: Transformer, plain: bool) -> Transformer:
    """The linears of the layers in int4; as the kernels' own layout, or dequantised for the reference."""
    for layer in model.layers:
        for parent, name in ((layer.self_attn, "qkv_proj"), (layer.self_attn, "o_proj"),
                             (layer.mlp, "gate_up_proj"), (layer.mlp, "down_proj")):  # fmt: skip
            linear = getattr(parent, name)
            packed = pack_blocked(quantize_rtn(linear.weight, 4, 32), torch.float32, "cpu" if plain else DEVICE)
            assert packed is not None
            weight = unpack_blocked(packed).dequantize()
            setattr(parent, name, Linear(weight, linear.bias) if plain else Linear(None, linear.bias, packed))
    return model


@pytest.mark.parametrize(
    ("config", "kv", "bits"), [(QWEN1, "fp32", 16), (QWEN3, "fp32", 16), (QWEN1, "int8", 4)], ids=str
)
def test_a_step_on_the_gpu_is_a_step_of_the_network(config: ModelConfig, kv: str, bits: int) -> None:
    """Two sequences past their prompts (one past the training length) and a padding row."""
    theirs, ours = network(config), network(config)
    if bits == 4:
        theirs, ours = quantised(theirs, plain=True), quantised(ours, plain=False)
    cache = KVCache(config, 12, 4, kv)
    prompts = [list(range(5)), list(range(3, 20))]
    tables = [[3, 1], [0, 5, 9, 2, 7]]
    alphas = [config.ntk_alpha(len(prompt)) for prompt in prompts]
    chunks = [Chunk(p, 0, t, a) for p, t, a in zip(prompts, tables, alphas, strict=True)]
    theirs(make_batch(chunks, 4), cache)
    expected_cache, cache_of_step = KVCache(config, 12, 4, kv), KVCache(config, 12, 4, kv, DEVICE)
    for copy in (expected_cache, cache_of_step):
        for mine, other in zip(copy.layers, cache.layers, strict=True):
            for name in ("key", "value", "key_affine", "value_affine"):
                if getattr(mine, name) is not None:
                    getattr(mine, name).copy_(getattr(other, name))
    new = [Chunk([token], len(p), t, a) for token, p, t, a in zip((11, 13), prompts, tables, alphas, strict=True)]
    expected = theirs.logits(theirs(make_batch(new, 4), expected_cache))

    step = DecodeStep(ours.to(DEVICE), cache_of_step, 3, 8, torch.device(DEVICE))
    step.buffers.input_ids[:2] = torch.tensor([11, 13])
    step.buffers.positions[:2] = torch.tensor([5, 17])
    step.buffers.slots[:2] = torch.tensor([1 * 4 + 1, 7 * 4 + 1])
    step.buffers.context_lens[:2] = torch.tensor([6, 18])
    for row, table in enumerate(tables):
        step.buffers.block_tables[row, : len(table)] = torch.tensor(table)
    step.set_alphas(alphas)
    logits = step.run()
    assert error(logits[:2].cpu(), expected) < (2e-3 if kv == "int8" else 1e-4)
    assert bool(logits[2].isfinite().all())
    for mine, other in zip(cache_of_step.layers, expected_cache.layers, strict=True):
        assert (mine.key.float().cpu() - other.key.float()).abs().max() <= (1 if kv == "int8" else 1e-4)


def test_greedy_takes_the_first_largest_real_token() -> None:
    logits = random(4, 2050)
    logits[0, 7] = logits[0, 1999] = 50
    logits[1, 2049] = 60  # a padding row of the head
    logits[2, 2045] = 70
    logits[3, 100] = torch.nan
    assert greedy(logits, 2049).tolist() == greedy_reference(logits, 2049).tolist()
    assert greedy(logits, 2049)[0] == 7 and greedy(logits, 2049)[3] == -1


@pytest.mark.parametrize("vocab", [2049, 2048, 3])
def test_greedy_never_takes_what_is_banned(vocab: int) -> None:
    """Whatever its logit is; the others' must be finite."""
    logits = random(5, 4100)
    banned = torch.zeros(vocab, dtype=torch.uint8, device=DEVICE)
    banned[[0, vocab - 1]] = 1
    logits[0, vocab - 1] = 50
    logits[1, 0] = torch.nan
    logits[2, 0] = torch.inf
    logits[3, 1] = -torch.inf
    out = torch.full((5,), 777, device=DEVICE)
    assert greedy(logits, vocab, banned, out) is out
    assert out.tolist() == greedy_reference(logits, vocab, banned).tolist()
    assert out[3] == -1 and out.tolist().count(-1) == 1 and not {0, vocab - 1} & set(out.tolist())
