"""Attention of a step that has prompts in it, on a GPU: flash attention for prompts, the split kernel for the rest.

`ragged_attention_reference` is the definition. Everything that depends on the step alone is derived once, in
`ragged_plan`; a layer then takes two launches where all prompts start in the step, and up to five where they do not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import TypeGuard

import torch
import triton
import triton.language as tl

from qwenfit.kernels.attention import LayerCache, RaggedStep, paged_attention_reference, write_kv
from qwenfit.kernels.hopper.attention import HEAD_DIMS, QUERIES, why_not
from qwenfit.kernels.norm import rms_norm
from qwenfit.kernels.rotary import rotate
from qwenfit.kernels.triton.decode_attention import NewTokens, Parts, contexts_in_parts, decode_step_attention
from qwenfit.kernels.triton.launch import options, start_after_previous
from qwenfit.kernels.triton.paged import scale_for
from qwenfit.kernels.triton.prompt_attention import Turn, prompt_attention, prompt_attention_reference, tiles_of
from qwenfit.kernels.triton.tuning import in_force, key, measured

_HEADS = 8  # of a program
# On a Hopper: the best of a dozen for heads of 64 and 128 numbers, shared or not.
HOPPER = {"m": 64, "n": 64, "warps": 4, "stages": 3}
HOPPER_SMALL_HEADS = {"m": 64, "n": 128, "warps": 4, "stages": 2}  # of 64, with prompts of more than SHORT tokens
SHORT = 1024
HOPPER_LONG = {"m": QUERIES, "hopper": 1}  # in CUDA C++, for more than LONG tokens in TILES tiles or more
LONG, TILES = 512, 72


@dataclass(frozen=True)
class RaggedPlan:
    """What the attention of every layer must know of a step, on the device."""

    singles: int  # at most so many sequences at the start bring one token each; those after them are the prompts
    before: torch.Tensor  # int32 [1]: how many they are
    single_contexts: torch.Tensor  # int64 [singles]
    single_parts: Parts | None  # None: there are none
    block_tables: torch.Tensor  # int32 [singles or more, max_blocks]
    query_lens: list[int]  # of the prompts; of a recorded step, whose prompts the device alone knows, all its rows
    context_lens: list[int]
    query_starts: torch.Tensor  # int32 [prompts + 1]: rows of the step, counted from the first prompt's
    context_starts: torch.Tensor  # int32 [prompts + 1]: rows of the contexts laid end to end
    context_slots: torch.Tensor | None  # int64 [sum of contexts]; None: every prompt is whole, nothing is read back
    config: dict[str, int] | None  # of our own attention, or of cuDNN's; None: torch's
    tiles: torch.Tensor | None  # int32 [programs, 2] as `prompt_attention` takes them, for our own
    padded: bool = False  # prompts may be shorter than query_lens says; query_starts holds their lengths


def ragged_plan(step: RaggedStep, heads: int, cache: LayerCache) -> RaggedPlan:
    """Derive the plan of a step for a model with so many heads and such a cache; the host waits for nothing."""
    device, size = step.slots.device, step.block_size
    singles = next((i for i, n in enumerate(step.query_lens) if n > 1), len(step.query_lens))
    queries, contexts = step.query_lens[singles:], step.context_lens[singles:]
    config = prompt_config(heads, cache, step.dtype, queries) if queries else None
    tiles = tiles_of(queries, contexts, config["m"]) if is_own(config) else []
    flat = chain.from_iterable(tiles)
    numbers = [*accumulate(queries, initial=0), *accumulate(contexts, initial=0), singles, *flat]
    on_device = _on_device(torch.tensor(numbers, dtype=torch.int32), device)
    sizes = [len(queries) + 1, len(queries) + 1, 1, 2 * len(tiles)]
    query_starts, context_starts, before, tile_table = torch.split(on_device, sizes)
    slots = None
    if queries != contexts:
        lengths, total = context_starts.diff(), sum(contexts)
        which = torch.repeat_interleave(torch.arange(len(contexts), device=device), lengths, output_size=total)
        at = torch.arange(total, device=device) - context_starts[which]
        slots = step.block_tables[singles + which, at // size].long() * size + at % size
    single_contexts = _on_device(torch.tensor(step.context_lens[:singles], dtype=torch.int64), device)
    parts = contexts_in_parts(single_contexts, heads, cache) if singles else None
    return RaggedPlan(
        singles, before, single_contexts, parts, step.block_tables, queries, contexts, query_starts, context_starts,
        slots, config, tile_table.view(-1, 2) if tiles else None,
    )  # fmt: skip


def _on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cpu" or tensor.numel() == 0:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def prompt_config(heads: int, cache: LayerCache, dtype: torch.dtype, query_lens: list[int]) -> dict[str, int] | None:
    """What was measured as the fastest for prompts as long on this card: our own kernel's config, or cuDNN.

    None: nothing was measured.
    """
    kv_heads, head_dim = cache.key.shape[2:]
    return _fastest(cache.key.device, dtype, (heads, kv_heads, head_dim), max(query_lens))


def _fastest(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int], longest: int
) -> dict[str, int] | None:
    if device.type != "cuda" or dtype == torch.float32:
        return None
    heads, kv_heads, head_dim = shape
    config = measured("prompt_attention", (head_dim, heads // kv_heads, longest))
    if config is None or ("hopper" in config and not _has_hopper(device, dtype, head_dim)):
        return _by_rule(device, dtype, heads, head_dim, longest)
    return config


def _by_rule(
    device: torch.device, dtype: torch.dtype, heads: int, head_dim: int, longest: int
) -> dict[str, int] | None:
    if torch.cuda.get_device_capability(device)[0] != 9 or head_dim not in HEAD_DIMS:
        return None
    many = longest > LONG and heads * -(-longest // QUERIES) >= TILES
    if many and _has_hopper(device, dtype, head_dim):
        return HOPPER_LONG
    return HOPPER_SMALL_HEADS if head_dim == 64 and longest > SHORT else HOPPER


def _has_hopper(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    return dtype == torch.bfloat16 and head_dim in HEAD_DIMS and not why_not(device, head_dim)


def is_own(config: dict[str, int] | None) -> TypeGuard[dict[str, int]]:
    """Whether a config is one of `prompt_attention`."""
    return config is not None and "cudnn" not in config


def ragged_attention_reference(
    qkv: torch.Tensor, new: NewTokens, cache: LayerCache, step: RaggedStep, scale: float
) -> torch.Tensor:
    """qkv [T, heads + 2 kv_heads, head_dim] as projected -> [T, heads * head_dim]; keys and values enter the cache.

    Queries and keys are normalised (Qwen3), rotated and scaled (LogN) as `new` says, for all T tokens; a prompt attends
    to what the cache gives back, quantized where the cache is. The kernels round after the rotation, not before it too.
    """
    kv_heads = cache.key.shape[2]
    q, k, v = qkv.split((qkv.shape[1] - 2 * kv_heads, kv_heads, kv_heads), dim=1)
    if new.head_norms is not None:
        q, k = rms_norm(q, new.head_norms[0], new.eps), rms_norm(k, new.head_norms[1], new.eps)
    q, k = rotate(q, new.cos, new.sin), rotate(k, new.cos, new.sin)
    if new.query_scale is not None:
        q = q * new.query_scale
    write_kv(cache, k if new.key_centre is None else k - new.key_centre, v.contiguous(), step)
    return paged_attention_reference(q, cache, step, scale)


def ragged_attention(
    qkv: torch.Tensor, new: NewTokens, cache: LayerCache, plan: RaggedPlan, scale: float
) -> torch.Tensor:
    """`ragged_attention_reference` for a contiguous qkv, whose heads it overwrites."""
    tokens, kv_heads, singles = len(qkv), cache.key.shape[2], plan.singles
    heads = qkv.shape[1] - 2 * kv_heads
    out = torch.empty(tokens, heads, qkv.shape[2], dtype=qkv.dtype, device=qkv.device)
    if not plan.query_lens:
        return _singles(qkv, new, cache, plan, scale, out.flatten(1))
    turns = is_own(plan.config) and new.head_norms is None  # the attention rotates queries as it reads them
    rotate_in_place(qkv, new, cache, plan.before, queries=not turns)
    q, k, v = qkv[:, :heads], qkv[singles:, heads:-kv_heads], qkv[singles:, -kv_heads:]
    if plan.context_slots is not None:
        k, v = gather_context(cache, plan.context_slots, qkv.dtype)
    if singles:  # before the prompts, whose rows they may begin with where a step is recorded
        _singles(qkv[:singles], new, cache, plan, scale, out[:singles].flatten(1))
    if is_own(plan.config) and plan.tiles is not None:
        turn = Turn(new.cos, new.sin, new.query_scale) if turns else None
        starts = plan.query_starts, plan.context_starts
        prompt_attention(q, k, v, *starts, plan.tiles, scale, plan.config, turn, plan.before, out)
    else:
        out[singles:] = _attend_prompts(q[singles:], k, v, plan, scale)
    return out.flatten(1)


def _singles(
    qkv: torch.Tensor, new: NewTokens, cache: LayerCache, plan: RaggedPlan, scale: float, out: torch.Tensor
) -> torch.Tensor:
    count = plan.singles
    query_scale = None if new.query_scale is None else new.query_scale[:count]
    new = replace(new, cos=new.cos[:count], sin=new.sin[:count], query_scale=query_scale, slots=new.slots[:count])
    contexts, tables = plan.single_contexts, plan.block_tables
    return decode_step_attention(qkv, new, cache, tables, contexts, scale, out, parts=plan.single_parts)


def _attend_prompts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: RaggedPlan, scale: float) -> torch.Tensor:
    """`prompt_attention_reference`, by torch or cuDNN."""
    if not q.is_cuda or q.dtype == torch.float32:  # which flash attention does not take
        return prompt_attention_reference(q, k, v, plan.query_lens, plan.context_lens, scale)  # causal: padding is last
    whole = len(plan.query_lens) == 1 and plan.context_slots is None and not plan.padded
    return (cudnn if plan.config is not None and whole else flash)(q, k, v, plan, scale)


def compile_prompt_attention(qkv: torch.Tensor, kv_heads: int, turn: Turn | None) -> None:
    """Run the attention of prompts with each config that a length may choose on this card, so that none waits for it.

    qkv [tokens, heads + 2 kv_heads, head_dim] is a prompt of any content; `turn` as the model has it.
    """
    heads, head_dim = qkv.shape[1] - 2 * kv_heads, qkv.shape[2]
    starts = torch.tensor([0, len(qkv), 0, 0], dtype=torch.int32, device=qkv.device)
    tiles, before = starts[2:].view(1, 2), starts[2:3]
    q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)
    wanted = key("prompt_attention", (head_dim, heads // kv_heads, 1)).removesuffix("1")
    possible: list[dict[str, int] | None] = [config for name, config in in_force().items() if name.startswith(wanted)]
    if q.is_cuda and q.dtype != torch.float32:
        few, many = LONG, TILES * QUERIES  # tokens
        possible += [_by_rule(q.device, q.dtype, heads, head_dim, length) for length in (few, many)]
        possible += [HOPPER_SMALL_HEADS] if head_dim == 64 and HOPPER in possible else []
    for config in {str(config): config for config in possible}.values():
        if is_own(config):
            prompt_attention(q, k, v, starts[:2], starts[:2], tiles, 1.0, config, turn, before)


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: RaggedPlan, scale: float) -> torch.Tensor:
    """torch's flash attention of all prompts at once; each one's queries are the last rows of its causal square."""
    out: torch.Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, plan.query_starts, plan.context_starts, max(plan.query_lens), max(plan.context_lens),
        0.0, True, False, scale=scale,
    )[0]  # fmt: skip
    return out


def cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: RaggedPlan, scale: float) -> torch.Tensor:
    """cuDNN's attention of one whole prompt. It plans every length when it first comes."""
    one, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_cudnn_attention(
        one, keys, values, None, False, 0.0, True, False, scale=scale
    )[0]
    return out[0].transpose(0, 1)


def rotate_in_place(
    qkv: torch.Tensor, new: NewTokens, cache: LayerCache, before: torch.Tensor, queries: bool = True
) -> None:
    """Make projected heads what attention takes, and write keys and values to the cache.

    All but those of the first rows, whose number is in `before`, int32 [1]; those of rows with slot -1 are not written.
    qkv [T, heads + 2 kv_heads, head_dim] is contiguous; head_dim is a power of two. Keys and values become what the
    cache will give back; without `queries` these stay as they are.
    """
    tokens, all_heads, head_dim = qkv.shape
    kv_heads = cache.key.shape[2]
    first_head = 0 if queries else all_heads - 2 * kv_heads
    q_norm, k_norm = new.head_norms or (None, None)
    _rotate_in_place[(tokens, triton.cdiv(all_heads - first_head, _HEADS))](
        qkv, new.cos, new.sin, new.query_scale, q_norm, k_norm, new.key_centre, new.slots,
        cache.key, cache.value, cache.key_affine, cache.value_affine, before, new.eps,
        HEADS=all_heads - 2 * kv_heads, KV_HEADS=kv_heads, FIRST_HEAD=first_head, HALF=head_dim // 2,
        PER_PROGRAM=_HEADS, HAS_SCALE=new.query_scale is not None, HAS_NORM=new.head_norms is not None,
        HAS_CENTRE=new.key_centre is not None, QUANTIZED=cache.key_affine is not None, num_warps=4, **options(qkv),
    )  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=["before_ptr"])
def _rotate_in_place(
    qkv_ptr, cos_ptr, sin_ptr, query_scale_ptr, q_norm_ptr, k_norm_ptr, centre_ptr, slots_ptr,
    key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, before_ptr, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, FIRST_HEAD: tl.constexpr, HALF: tl.constexpr,
    PER_PROGRAM: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_NORM: tl.constexpr, HAS_CENTRE: tl.constexpr,
    QUANTIZED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    # A thread holds both partners of a rotation, so that it may overwrite them without waiting for another.
    start_after_previous(OVERLAP)
    DIM: tl.constexpr = 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    head = FIRST_HEAD + tl.program_id(1) * PER_PROGRAM + tl.arange(0, PER_PROGRAM)[:, None]
    d = tl.arange(0, HALF)[None, :]
    dtype = qkv_ptr.dtype.element_ty
    before = tl.load(before_ptr + tl.zeros([1, 1], tl.int32))
    inside = (head < HEADS + 2 * KV_HEADS) & (token >= before)
    rotated = inside & (head < HEADS + KV_HEADS)
    is_query, is_key, is_value = head < HEADS, (head >= HEADS) & rotated, inside & (head >= HEADS + KV_HEADS)
    at = qkv_ptr + (token * (HEADS + 2 * KV_HEADS) + head) * DIM + d
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        inverse = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / DIM + eps)[:, None]
        weight_a = tl.where(is_query, tl.load(q_norm_ptr + d), tl.load(k_norm_ptr + d)).to(tl.float32)
        weight_b = tl.where(is_query, tl.load(q_norm_ptr + HALF + d), tl.load(k_norm_ptr + HALF + d)).to(tl.float32)
        a, b = tl.where(rotated, a * inverse * weight_a, a), tl.where(rotated, b * inverse * weight_b, b)
    cos = tl.load(cos_ptr + token * DIM + d)
    sin = tl.load(sin_ptr + token * DIM + HALF + d)
    turned_a = (a * cos - b * sin).to(dtype).to(tl.float32)
    turned_b = (b * cos + a * sin).to(dtype).to(tl.float32)
    a, b = tl.where(rotated, turned_a, a), tl.where(rotated, turned_b, b)
    if HAS_SCALE:
        factor = tl.where(is_query, tl.load(query_scale_ptr + token).to(tl.float32), 1.0)
        a, b = (a * factor).to(dtype).to(tl.float32), (b * factor).to(dtype).to(tl.float32)
    if HAS_CENTRE:
        centre = centre_ptr + (head - HEADS) * DIM + d
        a = (a - tl.load(centre, mask=is_key & (d < HALF), other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        b = (b - tl.load(centre + HALF, mask=is_key & (d < HALF), other=0.0).to(tl.float32)).to(dtype).to(tl.float32)

    slot = tl.load(slots_ptr + token + tl.zeros([1, 1], tl.int32)).to(tl.int64)
    is_key, is_value = is_key & (slot >= 0), is_value & (slot >= 0)
    vector = slot * KV_HEADS + tl.where(is_value, head - HEADS - KV_HEADS, head - HEADS)
    if QUANTIZED:
        low = tl.minimum(tl.min(a, axis=1), tl.min(b, axis=1))[:, None]
        high = tl.maximum(tl.max(a, axis=1), tl.max(b, axis=1))[:, None]
        scale = scale_for(low, high)
        zero = -low / scale
        code_a, code_b = tl.floor((a - low) / scale + 0.5), tl.floor((b - low) / scale + 0.5)
        tl.store(key_affine_ptr + vector * 2, scale, mask=is_key)
        tl.store(key_affine_ptr + vector * 2 + 1, zero, mask=is_key)
        tl.store(value_affine_ptr + vector * 2, scale, mask=is_value)
        tl.store(value_affine_ptr + vector * 2 + 1, zero, mask=is_value)
        a, b = tl.where(is_query, a, (code_a - zero) * scale), tl.where(is_query, b, (code_b - zero) * scale)
    else:
        code_a, code_b = a, b
    stored_a, stored_b = code_a.to(key_ptr.dtype.element_ty), code_b.to(key_ptr.dtype.element_ty)
    place = vector * DIM + d
    tl.store(key_ptr + place, stored_a, mask=is_key & (d < HALF))
    tl.store(key_ptr + place + HALF, stored_b, mask=is_key & (d < HALF))
    tl.store(value_ptr + place, stored_a, mask=is_value & (d < HALF))
    tl.store(value_ptr + place + HALF, stored_b, mask=is_value & (d < HALF))
    changed = inside & (d < HALF) if QUANTIZED else rotated & (d < HALF)
    tl.store(at, a.to(dtype), mask=changed)
    tl.store(at + HALF, b.to(dtype), mask=changed)


def gather_context_reference(
    cache: LayerCache, slots: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the tokens in `slots` int64 [N], each [N, kv_heads, head_dim] of `dtype`, dequantised."""
    both = []
    for stored, affine in ((cache.key, cache.key_affine), (cache.value, cache.value_affine)):
        x = stored.flatten(0, 1)[slots].float()
        if affine is not None:
            scale, zero = affine.flatten(0, 1)[slots].unbind(-1)
            x = (x - zero[..., None]) * scale[..., None]
        both.append(x.to(dtype))
    return both[0], both[1]


def gather_context(cache: LayerCache, slots: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`gather_context_reference` in one kernel; head_dim is a power of two. A slot of -1 leaves its row as it is."""
    kv_heads, head_dim = cache.key.shape[2:]
    keys = torch.empty(len(slots), kv_heads, head_dim, dtype=dtype, device=slots.device)
    values = torch.empty_like(keys)
    _gather_context[(len(slots), triton.cdiv(kv_heads, _HEADS))](
        cache.key, cache.value, cache.key_affine, cache.value_affine, slots, keys, values,
        KV_HEADS=kv_heads, DIM=head_dim, PER_PROGRAM=_HEADS, QUANTIZED=cache.key_affine is not None, **options(keys),
    )  # fmt: skip
    return keys, values


@triton.jit
def _gather_context(
    key_ptr, value_ptr, key_affine_ptr, value_affine_ptr, slots_ptr, keys_ptr, values_ptr,
    KV_HEADS: tl.constexpr, DIM: tl.constexpr, PER_PROGRAM: tl.constexpr, QUANTIZED: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    start_after_previous(OVERLAP)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * PER_PROGRAM + tl.arange(0, PER_PROGRAM)[:, None]
    d = tl.arange(0, DIM)[None, :]
    slot = tl.load(slots_ptr + token + tl.zeros([1, 1], tl.int32)).to(tl.int64)
    some = (head < KV_HEADS) & (slot >= 0)
    here, vector = some & (d < DIM), slot * KV_HEADS + head
    k = tl.load(key_ptr + vector * DIM + d, mask=here, other=0)
    v = tl.load(value_ptr + vector * DIM + d, mask=here, other=0)
    if QUANTIZED:
        k = k.to(tl.float32) - tl.load(key_affine_ptr + vector * 2 + 1, mask=some, other=0.0)
        v = v.to(tl.float32) - tl.load(value_affine_ptr + vector * 2 + 1, mask=some, other=0.0)
        k *= tl.load(key_affine_ptr + vector * 2, mask=some, other=0.0)
        v *= tl.load(value_affine_ptr + vector * 2, mask=some, other=0.0)
    place = (token * KV_HEADS + head) * DIM + d
    tl.store(keys_ptr + place, k.to(keys_ptr.dtype.element_ty), mask=here)
    tl.store(values_ptr + place, v.to(values_ptr.dtype.element_ty), mask=here)
