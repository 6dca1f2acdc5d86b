"""The gate of SwiGLU (arXiv 2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from qwenfit.kernels import block


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [tokens, 2 * width], the gate first -> silu(gate) * up [tokens, width]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """As the reference."""
    return block.silu_mul(gate_up) if block.usable(gate_up) else silu_mul_reference(gate_up)
