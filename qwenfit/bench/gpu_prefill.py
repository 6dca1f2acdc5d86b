"""Prompts on a GPU: which attention is the fastest, and how exact their logits are."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate

import torch
from torch import nn

from qwenfit.bench.gpu_common import (
    BLOCK_SIZE,
    DEVICE,
    GPU,
    Figures,
    prompt,
    random_network,
    relative_error,
    synchronize,
    tiny,
)
from qwenfit.bench.gpu_kernels import time_us
from qwenfit.checkpoint.resolve import resolve_model
from qwenfit.config import ModelConfig
from qwenfit.kernels.kv_quant import dequantize_kv
from qwenfit.kernels.rotary import both_halves
from qwenfit.kernels.triton import ragged, tuning
from qwenfit.kernels.triton.prompt_attention import Turn, prompt_attention, prompt_attention_reference, tiles_of
from qwenfit.model.attention import FullContext
from qwenfit.model.batch import Chunk, make_batch
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.rotary import inverse_frequencies
from qwenfit.model.transformer import Transformer

Run = Callable[[], torch.Tensor]
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Shape = tuple[int, int, int]  # heads, kv_heads, head_dim
OWN, *OTHERS = [  # Qwen-7B; Qwen-1.8B, Qwen2.5-7B, Qwen3-8B, Qwen2.5-1.5B, Qwen2.5-0.5B
    (32, 32, 128), (16, 16, 128), (28, 4, 128), (32, 8, 128), (12, 2, 128), (14, 2, 64)
]  # fmt: skip
LAYERS = 32  # of Qwen-7B
LENGTHS = (64, 256, 384, 512, 640, 768, 1024, 2048, 8192)
CONFIGS = [
    {"m": 128, "n": 128, "warps": 8, "stages": 2},
    {"m": 128, "n": 64, "warps": 8, "stages": 3},
    {"m": 128, "n": 64, "warps": 4, "stages": 3},
    {"m": 64, "n": 64, "warps": 4, "stages": 3},
    {"m": 64, "n": 128, "warps": 4, "stages": 2},
    ragged.HOPPER_LONG,
]
CASES: list[tuple[str, str, int | None]] = [  # model, KV cache, bits of the layers
    ("Qwen-7B", "bf16", None),
    ("Qwen-7B", "int8", None),
    ("Qwen2.5-7B", "bf16", None),
    ("Qwen3-8B", "int8", None),
    ("Qwen-7B", "bf16", 4),
]
LONG = 1400  # tokens of a prompt that is checked too, and whose second part takes the attention of long ones
SINGLE = 8  # tokens, each in a step of its own
BOUND = 1e-2  # of the relative error of logits


# The attention of a prompt


def projected(queries: list[int], contexts: list[int], shape: Shape = OWN) -> Three:
    """q, k, v as a layer has them: views into projected heads, or keys and values of longer contexts."""
    heads, kv_heads, head_dim = shape
    qkv = torch.randn(sum(queries), heads + 2 * kv_heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
    if queries == contexts:
        return qkv[:, :heads], qkv[:, heads:-kv_heads], qkv[:, -kv_heads:]
    keys = torch.randn(2, sum(contexts), kv_heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
    return qkv[:, :heads], keys[0], keys[1]


def plan_of(queries: list[int], contexts: list[int], config: dict[str, int] | None = None) -> ragged.RaggedPlan:
    """Of prompts alone, for our own attention with a config."""
    tiles = tiles_of(queries, contexts, config["m"]) if config else []
    numbers = [[*accumulate(queries, initial=0)], [*accumulate(contexts, initial=0)], tiles, [0]]
    starts, context_starts, programs, before = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in numbers)
    empty = torch.empty(0, dtype=torch.int64, device=DEVICE)
    slots = None if queries == contexts else empty
    config = config or {"cudnn": 1}
    return ragged.RaggedPlan(
        0, before, empty, None, empty, queries, contexts, starts, context_starts, slots, config, programs
    )


def attention_of(
    config: dict[str, int], queries: list[int], contexts: list[int], tensors: Three, turn: Turn | None = None
) -> Run:
    plan = plan_of(queries, contexts, config)
    assert plan.tiles is not None
    starts, scale = (plan.query_starts, plan.context_starts), tensors[0].shape[2] ** -0.5
    return partial(prompt_attention, *tensors, *starts, plan.tiles, scale, config, turn)


def turn_of(length: int, head_dim: int) -> Turn:
    """What rotates the queries of a prompt, as a model has it."""
    radians = torch.arange(length, device=DEVICE)[:, None] * inverse_frequencies(head_dim, 1e4).to(DEVICE)
    return Turn(*both_halves(radians.cos(), radians.sin()), None)


def compile_attention(config: dict[str, int]) -> None:
    """Only for the cache on disk."""
    attention_of(config, [130], [130], projected([130], [130]))()
    attention_of(config, [7, 130], [7, 200], projected([7, 130], [7, 200], (4, 4, 128)))()
    for shape in (OWN, *OTHERS):
        attention_of(config, [130], [130], projected([130], [130], shape), turn_of(130, shape[2]))()


def milliseconds(run: Run, length: int) -> float:
    """Of a launch for a prompt of `length` tokens, one after the other in a CUDA graph."""
    return time_us([run] * min(LAYERS, (1 << 15) // length)) / 1e3


def choose_attention() -> Figures:
    """Times torch's flash attention, cuDNN's and ours; puts the fastest exact one in force for each shape and length.

    cuDNN plans a length that it has not seen, for a while: it has to save more than that in one prompt.
    """
    if not GPU:
        return {"skipped": "needs a GPU"}
    made: Figures = {"rows": [], "configs": {}}
    working: list[dict[str, int]] = []
    for config in CONFIGS:
        queries, contexts = [7, 130, 300, 1], [7, 200, 300, 140]
        tensors = projected(queries, contexts, (4, 2, 128))
        q, k, v = (x.float() for x in tensors)
        expected = prompt_attention_reference(q, k, v, queries, contexts, 128**-0.5)
        try:
            error = relative_error(attention_of(config, queries, contexts, tensors)(), expected)
        except Exception as failure:  # a config may want more shared memory than there is
            made["rows"].append({"config": config, "failed": repr(failure)[:200]})
            continue
        made["rows"].append({"config": config, "error": error})
        working += [config] if error < BOUND else []
    for shape in (OWN, *OTHERS):
        for length in LENGTHS:
            row = time_attention(shape, length, working)
            if row["best"] is not None:
                name = tuning.key("prompt_attention", (shape[2], shape[0] // shape[1], length))
                made["configs"][name] = row["best"]
            made["rows"].append(row)
    tuning.put_in_force(made["configs"])
    return made


def time_attention(shape: Shape, length: int, configs: list[dict[str, int]]) -> Figures:
    """Milliseconds of a prompt of `length` tokens by torch, by ours with each config and, of OWN, by cuDNN.

    Ours rotates the queries too.
    """
    tensors, plan, turn = projected([length], [length], shape), plan_of([length], [length]), turn_of(length, shape[2])
    flash = milliseconds(partial(ragged.flash, *tensors, plan, shape[2] ** -0.5), length)
    timed: list[tuple[float, dict[str, int] | None]] = [(flash, None)]
    for config in configs:
        timed.append((milliseconds(attention_of(config, [length], [length], tensors, turn), length), config))
    row: Figures = {"shape": shape, "length": length, "flash": flash, "ours": [ms for ms, _ in timed[1:]]}
    try:
        row |= time_cudnn(length) if shape == OWN else {}
        if "cudnn" in row and (min(ms for ms, _ in timed) - row["cudnn"]) * LAYERS > row["cudnn_plans"]:
            timed.append((row["cudnn"], {"cudnn": 1}))
    except Exception as failure:
        row["cudnn_failed"] = repr(failure)[:200]
    return row | {"best": min(timed, key=lambda pair: pair[0])[1]}


def time_cudnn(length: int) -> Figures:
    """Milliseconds of a launch, its error, and what the first launch at a length not seen before takes."""
    for unseen in (length - 1, length - 3):
        tensors, plan = projected([unseen], [unseen]), plan_of([unseen], [unseen])
        synchronize()
        began = time.perf_counter()
        out = ragged.cudnn(*tensors, plan, 128**-0.5)
        synchronize()
        first = (time.perf_counter() - began) * 1e3
    error = relative_error(out, ragged.flash(*tensors, plan, 128**-0.5))
    tensors, plan = projected([length], [length]), plan_of([length], [length])
    again = milliseconds(partial(ragged.cudnn, *tensors, plan, 128**-0.5), length)
    return {"cudnn": again if error < BOUND else float("inf"), "cudnn_plans": first - again, "cudnn_error": error}


# Errors


class StoredContext(FullContext):
    """Attends, in float32, to the keys and values that a quantized cache holds of one sequence."""

    centred = True

    def __init__(self, cache: KVCache, table: torch.Tensor, length: int) -> None:
        """table: int [blocks], those of the sequence."""
        super().__init__(1, None)
        at = torch.arange(length, device=table.device)
        self.cache, self.offset = cache, at % cache.block_size
        self.block = table[at // cache.block_size].long()

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cache, where = self.cache.layers[layer], (self.block, self.offset)
        assert cache.key_affine is not None and cache.value_affine is not None
        k = dequantize_kv(cache.key[where], cache.key_affine[where], torch.float32)
        v = dequantize_kv(cache.value[where], cache.value_affine[where], torch.float32)
        return super().attend(layer, q, k, v)


def reference_logits(plain: Transformer, ids: list[int], stored: StoredContext | None = None) -> torch.Tensor:
    """Of a whole prompt, [tokens, vocab_size]: by the network as it is, or attending to what a cache holds."""
    tokens, length = torch.tensor([ids], device=DEVICE), len(ids)
    if stored is None:
        return plain.logits(plain.forward_full(tokens))[0]
    positions, alpha = torch.arange(length, device=DEVICE), plain.config.ntk_alpha(length)
    angles = plain.rotary.angles(positions, [length], [alpha], length, torch.float32)
    return plain.logits(plain._run(tokens.flatten(), angles, stored))


def in_float32(model: Transformer, config: ModelConfig) -> Transformer:
    """The plain network with the same weights, unpacked."""
    from qwenfit.kernels.packed import dequantize

    plain = Transformer(config, torch.float32, "meta")
    for key in [key for key, _ in plain.named_parameters()]:
        module, _, leaf = key.rpartition(".")
        owner = model.get_submodule(module)
        packed = getattr(owner, "packed", None) if leaf == "weight" else None
        value = dequantize(packed) if packed is not None else getattr(owner, leaf).float()
        setattr(plain.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
    return plain.eval()


@torch.inference_mode()
def check_prefill(name: str, kv: str, bits: int | None, length: int = 64) -> Figures:
    """Errors of logits of 2 layers in bf16 against float32: a prompt whole, and in two parts beside another sequence.

    The reference attends to what the cache holds, if that is int8. `plain_bf16` is the same of the network as it
    stands, every operation of it rounded to bf16: what any path in bf16 may be expected to reach.
    """
    config = replace(resolve_model(name), num_layers=2) if GPU else tiny(name)
    model = random_network(config, torch.bfloat16, DEVICE, bits)
    plain = in_float32(model, config)
    ids = prompt(length, config, 3)
    alpha = config.ntk_alpha(length)
    blocks = -(-length // BLOCK_SIZE)
    cache = KVCache(config, 3 * blocks, BLOCK_SIZE, kv, DEVICE)
    tables = torch.randperm(3 * blocks, generator=torch.Generator().manual_seed(0)).view(3, blocks)

    def run(*chunks: Chunk) -> torch.Tensor:
        batch = make_batch(chunks, BLOCK_SIZE, DEVICE)
        return model.logits(model.forward(batch, cache)[batch.logits_indices])

    def expected(which: int) -> torch.Tensor:
        return reference_logits(
            plain, ids, StoredContext(cache, tables[which].to(DEVICE), length) if kv == "int8" else None
        )

    half, blocks_of = length // 2, tables.tolist()
    whole = run(Chunk(ids, 0, blocks_of[0], alpha, "all"))
    run(Chunk(ids[:half], 0, blocks_of[1], alpha, "none"), Chunk(ids[:-1], 0, blocks_of[2], alpha, "none"))
    mixed = run(
        Chunk(ids[-1:], length - 1, blocks_of[2], alpha), Chunk(ids[half:], half, blocks_of[1], alpha, "all")
    )  # fmt: skip
    # The error of one row of logits varies by a twentieth: of the last SINGLE tokens, each by itself.
    singles = [mixed[:1]]
    for back in range(2, SINGLE + 1):
        singles.insert(0, run(Chunk(ids[-back : 1 - back], length - back, blocks_of[2], alpha)))
    return {
        "model": name,
        "kv_cache": kv,
        "bits": bits,
        "tokens": length,
        "whole": relative_error(whole, expected(0)),
        "second_part": relative_error(mixed[1:], expected(1)[half:]),
        "single_token": relative_error(torch.cat(singles), expected(2)[-SINGLE:]),
        "plain_bf16": relative_error(reference_logits(model, ids), reference_logits(plain, ids)),
    }


def check_errors() -> Figures:
    found = [check_prefill(*case) for case in (CASES if GPU else CASES[:3])]
    found += [check_prefill(*case, LONG) for case in (CASES[0], CASES[3]) if GPU]
    worst = max(max(c["whole"], c["single_token"], c["second_part"]) for c in found)
    return {"cases": found, "worst": worst, "worst_plain_bf16": max(c["plain_bf16"] for c in found)}
