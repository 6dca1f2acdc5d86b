"""Attention of prompts in CUDA C++: triton/prompt_attention.py's kernel for long prompts on a Hopper."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

import torch

from qwenfit.kernels.hopper.compiled import Kernel, cores, kernel_of, tensor_map, why_missing
from qwenfit.kernels.hopper.instructions import text, wgmma, wgmma_held
from qwenfit.kernels.triton.launch import compiled_instead

if TYPE_CHECKING:
    from qwenfit.kernels.triton.prompt_attention import Turn

QUERIES = 128  # of a tile
HEAD_DIMS = (64, 128)
KEYS = 128  # of a block
_THREADS = 384


def source(head_dim: int) -> str:
    parts = [text("primitives.cuh"), wgmma(KEYS), wgmma_held(head_dim), text("fragments.cuh"), text("attention.cu")]
    return "\n".join([f"#define DIM {head_dim}", *parts])


def shared_bytes(head_dim: int) -> int:
    """Two tiles each of queries, keys and values, two barriers for each, and two jobs."""
    return 6 * (2 * 128 * head_dim + 16) + 2 * 32


@functools.cache
def why_not(device: torch.device, head_dim: int) -> str:
    """Why the kernel for heads of HEAD_DIMS is missing on a GPU; empty where it is there."""
    return why_missing(device, lambda: _kernel(head_dim, device))


def hopper_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_starts: torch.Tensor,
    context_starts: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    turn: Turn | None,
    before: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """`prompt_attention` for bfloat16 heads of one of HEAD_DIMS and tiles of QUERIES.

    All tensors lie at multiples of 16 bytes, tokens of q, k and v multiples of 8 numbers apart, the others contiguous.
    """
    device, (_, heads, head_dim), kv_heads = q.device, q.shape, k.shape[1]
    if compiled_instead(("hopper attention", head_dim, device), lambda: _kernel(head_dim, device)):
        return out
    jobs = heads * len(tiles)
    if jobs == 0:
        return out
    maps = [tensor_map(x.data_ptr(), len(x), kv_heads * head_dim, x.stride(0), KEYS) for x in (k, v)]
    cos, sin, query_scale = turn or (None, None, None)
    pointers = (q, out, cos, sin, query_scale, query_starts, context_starts, tiles, before)
    _kernel(head_dim, device)(
        min(jobs, cores(device)),
        torch.cuda.current_stream(device).cuda_stream,
        (
            *maps,
            *(ctypes.c_void_p(None if x is None else x.data_ptr()) for x in pointers),
            ctypes.c_longlong(q.stride(0)),
            ctypes.c_float(scale * 1.4426950408889634),
            *map(ctypes.c_int, (heads, heads // kv_heads, jobs, len(q))),
        ),
    )
    return out


@functools.cache
def _kernel(head_dim: int, device: torch.device) -> Kernel:
    return kernel_of(source(head_dim), "hopper_attention", device, _THREADS, shared_bytes(head_dim))
