"""Queries, keys and values out of one product, the first two rotated, with the gradient: one kernel each way."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qwenfit.kernels.rotary import rotate_reference
from qwenfit.kernels.triton.launch import FUSED_SUMS

_HEADS = 8  # of a program


def rotated_heads_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv [tokens, (heads + 2 kv_heads) * head_dim] -> q [tokens, heads, head_dim], k and v [tokens, kv_heads, ...].

    cos and sin as `rotate_reference` takes them; differentiable in qkv.
    """
    split = qkv.view(len(qkv), heads + 2 * kv_heads, -1)
    turned = rotate_reference(split[:, :-kv_heads], cos, sin)
    return turned[:, :heads], turned[:, heads:], split[:, -kv_heads:]


def rotated_heads(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """`rotated_heads_reference` for a contiguous qkv; q, k and v lie in one new tensor."""
    q, k, v = _RotatedHeads.apply(qkv, cos, sin, heads, kv_heads)
    return q, k, v


class _RotatedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        parts = _parts(qkv.view(len(qkv), heads + 2 * kv_heads, -1), heads, kv_heads)
        return _parts(turn(*parts, cos, sin, 1.0), heads, kv_heads)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        q, k, v = (g if _rows_dense(g) else g.contiguous() for g in grad_outputs)
        return turn(q, k, v, cos, sin, -1.0).flatten(1), None, None, None, None


def _parts(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]


def _rows_dense(x: Tensor) -> bool:
    return x.stride(2) == 1 and x.stride(1) == x.shape[2]


def turn(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, sign: float, out: Tensor | None = None) -> Tensor:
    """[tokens, heads + 2 kv_heads, head_dim]: q and k rotated (sign -1: back, which is the gradient), v as it is."""
    tokens, heads, width = q.shape
    kv_heads = k.shape[1]
    if out is None:
        out = torch.empty(tokens, heads + 2 * kv_heads, width, dtype=q.dtype, device=q.device)
    _turn[(tokens, triton.cdiv(heads + 2 * kv_heads, _HEADS))](
        q, k, v, cos, sin, out, q.stride(0), k.stride(0), v.stride(0), sign, H=heads, KV=kv_heads, HALF=width // 2,
        LANES=triton.next_power_of_2(width // 2), TILE=_HEADS, num_warps=2, **FUSED_SUMS,
    )  # fmt: skip
    return out


@triton.jit
def _turn(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, out_ptr, q_stride, k_stride, v_stride, sign,
    H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, LANES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, LANES)
    head = (tl.program_id(1) * TILE + tl.arange(0, TILE))[:, None]
    inside = (lane < HALF)[None, :]
    is_q, is_k, is_v = head < H, (head >= H) & (head < H + KV), (head >= H + KV) & (head < H + 2 * KV)
    # The second half of `sin` is positive, and the halves of `cos` are equal.
    angle = token * 2 * HALF + HALF + lane
    cos = tl.load(cos_ptr + angle, mask=lane < HALF, other=0.0)[None, :]
    sin = tl.load(sin_ptr + angle, mask=lane < HALF, other=0.0)[None, :] * sign
    q_at = q_ptr + token * q_stride + head * 2 * HALF + lane[None, :]
    k_at = k_ptr + token * k_stride + (head - H) * 2 * HALF + lane[None, :]
    v_at = v_ptr + token * v_stride + (head - H - KV) * 2 * HALF + lane[None, :]
    one = tl.load(q_at, mask=is_q & inside, other=0.0).to(tl.float32)
    two = tl.load(q_at + HALF, mask=is_q & inside, other=0.0).to(tl.float32)
    one += tl.load(k_at, mask=is_k & inside, other=0.0).to(tl.float32)
    two += tl.load(k_at + HALF, mask=is_k & inside, other=0.0).to(tl.float32)
    turned_one, turned_two = one * cos - two * sin, two * cos + one * sin
    turned_one += tl.load(v_at, mask=is_v & inside, other=0.0).to(tl.float32)
    turned_two += tl.load(v_at + HALF, mask=is_v & inside, other=0.0).to(tl.float32)
    out_at = out_ptr + (token * (H + 2 * KV) + head) * 2 * HALF + lane[None, :]
    here = (head < H + 2 * KV) & inside
    tl.store(out_at, turned_one.to(out_ptr.dtype.element_ty), mask=here)
    tl.store(out_at + HALF, turned_two.to(out_ptr.dtype.element_ty), mask=here)
