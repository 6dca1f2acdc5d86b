"""A decoding step on a GPU: one new token a sequence, in five to ten kernels a layer, on buffers that stay in place.

Nothing in it depends on the host, so a CUDA graph can record it once and replay it for every token.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch

from qwenfit.kernels.choice import INT_MATVEC_ROWS
from qwenfit.kernels.triton.decode_attention import Parts, contexts_in_parts, decode_step_attention
from qwenfit.kernels.triton.int_matvec import BlockedWeight
from qwenfit.kernels.triton.parts import arrival_counters
from qwenfit.kernels.triton.product import mlp as feed_forward
from qwenfit.kernels.triton.product import product
from qwenfit.kernels.triton.rotary_cache import embed_with_angles
from qwenfit.kernels.triton.step_inputs import StepBuffers
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.linear import Linear
from qwenfit.model.new_tokens import new_tokens
from qwenfit.model.rotary import Angles, inverse_frequencies
from qwenfit.model.transformer import Block, Transformer


class DecodeStep:
    """The step of `batch` sequences. Fill `buffers`, then `run`; rows with slot -1 and context 0 are padding."""

    def __init__(self, model: Transformer, cache: KVCache, batch: int, max_blocks: int, device: torch.device) -> None:
        config = model.config
        self.model, self.cache, self.device = model, cache, device
        self.buffers = StepBuffers.padding(batch, max_blocks, device)
        self._alphas = [1.0] * batch  # the NTK alpha that each row of `_inverse` stands for
        self._inverse = self._frequencies(1.0).repeat(batch, 1)  # float32 [batch, head_dim / 2]
        self._cos = torch.empty(batch, 1, config.head_dim, device=device)
        self._sin = torch.empty(batch, 1, config.head_dim, device=device)
        # What the layers add up is float32, but for one or two rows, whose kernels round nothing else.
        self._hidden = None
        if batch > INT_MATVEC_ROWS:
            self._hidden = torch.empty(batch, config.hidden_size, device=device)
        self._query_scale = torch.ones(batch, 1, 1, dtype=model.dtype, device=device)
        alone = config.num_heads == config.num_kv_heads  # heads that share keys count nothing
        self._arrived = arrival_counters(batch * config.num_heads, device) if alone else None
        self._training_length = config.training_length if config.use_logn_attn else None

    def set_alphas(self, alphas: Sequence[float]) -> None:
        """The NTK alpha of each request; the first rows."""
        for row, alpha in enumerate(alphas):
            if self._alphas[row] != alpha:
                self._inverse[row].copy_(self._frequencies(alpha))
                self._alphas[row] = alpha

    def _frequencies(self, alpha: float) -> torch.Tensor:
        config = self.model.config
        return inverse_frequencies(config.head_dim, config.rope_theta, alpha, config.yarn).to(self.device)

    @torch.inference_mode()
    def run(self, out: torch.Tensor | None = None, layers: int | None = None) -> torch.Tensor:
        """float32 logits [batch, vocab_size], in `out` if given; keys and values of the new tokens enter the cache.

        layers: only the first so many, where the kernels count and not the result.
        """
        model = self.model
        angles = (self._cos, self._sin, self._query_scale)
        contexts, stored = self.buffers.context_lens, self.cache.layers[0]
        parts = contexts_in_parts(contexts, model.config.num_heads, stored, self._arrived)
        x = embed_with_angles(
            self.buffers.input_ids, model.embed_tokens.weight, self.buffers.positions, self._inverse,
            model.rotary.scaling, self._training_length, angles, self._hidden,
        )  # fmt: skip
        for index, layer in enumerate(islice(model.layers, layers)):
            assert isinstance(layer, Block)
            x = self._layer(index, layer, x, parts)
        head = model.embed_tokens.weight if model.lm_head is None else weight_of(model.lm_head)
        norm = model.norm
        if isinstance(head, BlockedWeight):
            logits = product(x, head, norm=norm.weight, eps=norm.eps)
            return logits.float() if out is None else out.copy_(logits)
        return product(x, head, norm=norm.weight, eps=norm.eps, dtype=torch.float32, out=out)

    def _layer(self, index: int, layer: Block, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        attention, mlp = layer.self_attn, layer.mlp
        scale = None if self._training_length is None else self._query_scale
        angles = Angles(self._cos, self._sin, scale)
        new = new_tokens(attention, angles, self.buffers.slots, self.cache)
        norm = layer.input_layernorm
        qkv = product(
            x, weight_of(attention.qkv_proj), attention.qkv_proj.bias, None, norm.weight, norm.eps, near_attention=True
        )
        out = decode_step_attention(
            qkv.view(len(x), -1, attention.head_dim),
            new,
            self.cache.layers[index],
            self.buffers.block_tables,
            self.buffers.context_lens,
            attention.head_dim**-0.5,
            parts=parts,
        )
        x = product(out, weight_of(attention.o_proj), residual=x, near_attention=True)
        norm = layer.post_attention_layernorm
        return feed_forward(x, weight_of(mlp.gate_up_proj), weight_of(mlp.down_proj), norm.weight, norm.eps)


def weight_of(linear: Linear) -> torch.Tensor | BlockedWeight:
    """The weight in the form that `product` takes."""
    if linear.weight is not None:
        return linear.weight
    assert isinstance(linear.packed, BlockedWeight)
    return linear.packed
