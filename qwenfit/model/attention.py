"""The attention layer, and the two things it can attend to: a paged cache, or whole sequences (training)."""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from qwenfit.config import ModelConfig
from qwenfit.kernels.attention import RaggedStep, paged_attention, write_kv
from qwenfit.kernels.norm import rms_norm
from qwenfit.kernels.rotary import rotate
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.linear import Linear
from qwenfit.model.rotary import Angles, Rotary

CENTRED_OVER = 4096  # positions: a long conversation


class Context(Protocol):
    """Where keys and values live. Queries, keys and values come rotated."""

    centred: bool  # whether keys shall come less `Attention.key_centre`

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [T, heads, head_dim], k and v [T, kv_heads, head_dim] -> [T, heads * head_dim]."""
        ...


class PagedContext:
    """One step over the paged cache: writes the step's keys and values, then reads each sequence's."""

    def __init__(self, cache: KVCache, step: RaggedStep) -> None:
        self.cache, self.step = cache, step
        self.centred = cache.dtype == "int8"

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cache = self.cache.layers[layer]
        write_kv(cache, k, v, self.step)
        return paged_attention(q, cache, self.step, q.shape[-1] ** -0.5)


class FullContext:
    """Whole sequences [batch, length], flattened to T = batch * length tokens; nothing is cached. Differentiable."""

    centred = False

    def __init__(self, batch: int, attention_mask: torch.Tensor | None) -> None:
        """attention_mask: bool [batch, length], False where padded; None: no padding."""
        self.batch = batch
        self.mask = None
        if attention_mask is not None:
            length = attention_mask.shape[1]
            causal = torch.ones(length, length, dtype=torch.bool, device=attention_mask.device).tril()
            # A padded query sees itself: a row with nothing to see would be NaN.
            itself = torch.eye(length, dtype=torch.bool, device=attention_mask.device)
            self.mask = ((causal & attention_mask[:, None, :]) | itself)[:, None]  # [batch, 1, length, length]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.view(self.batch, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, is_causal=self.mask is None, enable_gqa=grouped
        )
        return out.transpose(1, 2).flatten(2).flatten(0, 1)


class Attention(nn.Module):
    """x [T, hidden] -> [T, hidden]: project, normalise heads (Qwen3), rotate, scale (LogN), attend, project."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.num_heads, self.num_kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.eps = config.rms_norm_eps
        outputs = config.q_size + 2 * config.kv_size
        self.qkv_proj = Linear.empty(config.hidden_size, outputs, config.qkv_bias, dtype, device)
        self.o_proj = Linear.empty(config.q_size, config.hidden_size, False, dtype, device)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = HeadNorm(config.head_dim, dtype, device)
            self.k_norm = HeadNorm(config.head_dim, dtype, device)

    def forward(
        self, x: torch.Tensor, angles: Angles, context: Context, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """rows: int64, those of x whose results are wanted, and come; all, if None."""
        # Queries and keys are heads of one tensor until they are used: normalised and rotated in one go.
        heads = self.qkv_proj(x).view(len(x), -1, self.head_dim)
        qk, v = heads[:, : -self.num_kv_heads], heads[:, -self.num_kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            weights = (self.q_norm.weight.expand(self.num_heads, -1), self.k_norm.weight.expand(self.num_kv_heads, -1))
            qk = rms_norm(qk, torch.cat(weights), self.eps)
        qk = rotate(qk, angles.cos, angles.sin)
        q, k = qk[:, : self.num_heads], qk[:, self.num_heads :]
        if angles.query_scale is not None:
            q = q * angles.query_scale
        if context.centred and self.key_centre is not None:
            k = k - self.key_centre
        attended = context.attend(self.layer, q, k, v)
        out: torch.Tensor = self.o_proj(attended if rows is None else attended[rows])
        return out

    @cached_property
    def key_centre(self) -> torch.Tensor | None:
        """The rotated key bias, averaged over positions, [kv_heads, head_dim]; None without one.

        Qwen's key biases reach 200 where keys are about 1, and set the step of a quantized key. What is the same in
        all keys adds the same to all scores of a query, which softmax does not see: so the part of the bias that
        hardly turns is left out of an int8 cache, and its keys are several times finer.
        """
        bias = self.qkv_proj.bias
        if bias is None:
            return None
        keys = bias[-2 * self.num_kv_heads * self.head_dim : -self.num_kv_heads * self.head_dim]
        positions = torch.arange(CENTRED_OVER, device=bias.device)
        angles = Rotary(self.config).angles(positions, [CENTRED_OVER], [1.0], CENTRED_OVER, torch.float32)
        cos, sin = angles.cos.mean(0, keepdim=True), angles.sin.mean(0, keepdim=True)
        heads = keys.detach().float().view(1, self.num_kv_heads, self.head_dim)
        return rotate(heads, cos, sin)[0].to(bias.dtype)


class HeadNorm(nn.Module):
    """The weight of Qwen3's RMSNorm over head_dim, for all heads of q or of k."""

    def __init__(self, head_dim: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim, dtype=dtype, device=device))
