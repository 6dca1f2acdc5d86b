"""The one network: every dense Qwen from Qwen-1 to Qwen3. What differs between them is a field of ModelConfig."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from qwenfit.config import ModelConfig
from qwenfit.kernels.activation import silu_mul
from qwenfit.kernels.linear import linear
from qwenfit.kernels.norm import rms_norm
from qwenfit.kernels.wide import wide_product
from qwenfit.model.attention import Attention, Context, FullContext, PagedContext
from qwenfit.model.batch import Batch
from qwenfit.model.kv_cache import PARITY, KVCache
from qwenfit.model.linear import Linear
from qwenfit.model.rotary import Angles, Rotary


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype, device=device))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        h, m = config.hidden_size, config.intermediate_size
        self.gate_up_proj = Linear.empty(h, 2 * m, False, dtype, device)
        self.down_proj = Linear.empty(m, h, False, dtype, device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down_proj(silu_mul(self.gate_up_proj(x)))
        return out


class Block(nn.Module):
    """One pre-norm layer: x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.self_attn = Attention(config, layer, dtype, device)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.mlp = MLP(config, dtype, device)

    @property
    def linears(self) -> tuple[Linear, Linear, Linear, Linear]:
        """Its matrix products, in the order in which they are taken."""
        return self.self_attn.qkv_proj, self.self_attn.o_proj, self.mlp.gate_up_proj, self.mlp.down_proj

    def forward(
        self,
        x: torch.Tensor,
        angles: Angles,
        context: Context,
        fused: Callable[..., torch.Tensor] | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """fused: another way to compute the same (`tune/fused.py`), taken from here so that hooks on blocks run.

        rows: int64, those of x whose results are wanted, and come; all, if None. All keys and values enter the cache.
        """
        if fused is not None:
            return fused(self, x, angles, context)
        attended = self.self_attn(self.input_layernorm(x), angles, context, rows)
        x = attended + (x if rows is None else x[rows])
        out: torch.Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Transformer(nn.Module):
    """Token ids to logits. `Transformer(config, dtype, "meta")` allocates nothing, for a loader to fill.

    Parameters carry the canonical names (`checkpoint/names.py`). A layer linear, or `lm_head`, may be replaced by a
    quantized `Linear`. With tied embeddings `lm_head` is None and the head is the embedding, unless one is put there.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.rotary = Rotary(config)
        table = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=table)
        self.layers = nn.ModuleList(Block(config, i, dtype, device) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear.empty(config.hidden_size, config.vocab_size, False, dtype, device)

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache, rows: torch.Tensor | None = None) -> torch.Tensor:
        """One step: hidden states after the final norm, [T, hidden], or [len(rows), hidden] of the `rows` (int64) of T.

        The step's keys and values enter the cache. The last layer computes no more than `rows` ask for.
        """
        if batch.input_ids.is_cuda and cache.dtype != PARITY:
            from qwenfit.model.prefill import prefill

            return prefill(self, batch, cache, rows)
        angles = self.rotary.angles(
            batch.positions, batch.query_lens, batch.ntk_alphas, max(batch.context_lens), self.dtype
        )
        step = batch.step(cache.block_size, self.dtype)
        return self._run(batch.input_ids, angles, PagedContext(cache, step), rows)

    def forward_full(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Whole sequences without a cache, differentiable: hidden states [batch, length, hidden].

        input_ids int64 [batch, length]; attention_mask [batch, length], nonzero where a token is no padding, on
        either side. Positions do not count padding. In training mode NTK and LogN are off, as in Qwen-1's own code.
        """
        rows, length = input_ids.shape
        mask = None if attention_mask is None else attention_mask.bool()
        if mask is None:
            positions = torch.arange(length, device=input_ids.device).expand(rows, length)
            lengths = [length] * rows
        else:
            positions = (mask.cumsum(1) - 1).clamp_(min=0)
            lengths = mask.sum(1).tolist()
        alphas = [1.0 if self.training else self.config.ntk_alpha(n) for n in lengths]
        longest = 0 if self.training else max(lengths)
        angles = self.rotary.angles(positions.flatten(), [length] * rows, alphas, longest, self.dtype)
        return self._run(input_ids.flatten(), angles, FullContext(rows, mask)).view(rows, length, -1)

    def _run(
        self, input_ids: torch.Tensor, angles: Angles, context: Context, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        x = self.embed_tokens(input_ids)
        *before, last = self.layers
        for layer in before:
            x = layer(x, angles, context)
        x = last(x, angles, context, rows=rows)
        out: torch.Tensor = self.norm(x)
        return out

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """hidden [..., hidden_size] after the final norm -> float32 [..., vocab_size], padding rows included.

        In `out`, float32 and contiguous, if given.
        """
        weight = None
        if self.lm_head is None or type(self.lm_head) is Linear:  # not one with an adapter around it
            weight = self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight
        if hidden.is_cuda and hidden.dim() == 2 and weight is not None and not torch.is_grad_enabled():
            return wide_product(hidden, weight, out)
        if self.lm_head is not None:
            logits: torch.Tensor = self.lm_head(hidden)
        else:
            logits = linear(hidden, self.embed_tokens.weight, None)
        return logits.float() if out is None else out.copy_(logits)
