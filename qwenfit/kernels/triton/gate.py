"""SwiGLU's gate: silu(gate) * up, for more rows than the matrix-vector kernels take."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from qwenfit.kernels.triton.launch import options, start_after_previous

_TILE = 1024


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [tokens, 2 width], the gate first -> silu(gate) * up [tokens, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu_mul_reference` in one kernel, for a contiguous tensor; the product is rounded once."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, width, dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[(tokens, triton.cdiv(width, _TILE))](gate_up, out, WIDTH=width, TILE=_TILE, **options(out))
    return out


@triton.jit
def _silu_mul(gate_up_ptr, out_ptr, WIDTH: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr):
    start_after_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    gate = tl.load(gate_up_ptr + row * 2 * WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * WIDTH + WIDTH + i, mask=i < WIDTH, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * WIDTH + i, out.to(out_ptr.dtype.element_ty), mask=i < WIDTH)
