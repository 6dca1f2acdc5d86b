"""LoRA (arXiv 2106.09685) on the network's linear layers, and trained embeddings beside it.

The network fuses what checkpoints publish as several layers (q, k and v; gate and up). An adapter belongs to a
published layer: a fused layer therefore has one A and one B for each of its parts, and what PEFT writes can be read
back and forth without loss. The As of the parts are stacked, since they read the same input: one product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from qwenfit.checkpoint.names import layout_of, pieces_of
from qwenfit.errors import UsageError
from qwenfit.model.linear import Linear
from qwenfit.model.transformer import Transformer
from qwenfit.tune.quantized import frozen_quantized_linear

LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


@dataclass(frozen=True)
class LoRA:
    """The official script's values. The adapter's product is scaled by alpha / rank (`rslora`: alpha / sqrt(rank))."""

    rank: int = 64
    alpha: float = 16.0
    dropout: float = 0.05
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear(nn.Module):
    """base(x) + scale * B_i(A_i(dropout(x))) on the output rows of each part i. The base is frozen.

    lora_A [parts * rank, in] is uniform as PEFT's (Kaiming, a = sqrt(5)), lora_B [rows of the part, rank] zero, so
    that training starts at the base model. Both may be wider than the activations (float32 beside bfloat16).
    """

    def __init__(self, base: Linear, parts: tuple[int, ...], lora: LoRA, in_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        device = (base.weight if base.packed is None else base.packed.scales).device  # type: ignore[union-attr]
        if device.type == "meta":  # a base that is filled later, by shards
            device = torch.device("cpu")
        self.base, self.lora = base, lora
        self.lora_A = nn.Parameter(torch.empty(len(parts) * lora.rank, in_features, dtype=dtype, device=device))
        self.lora_B = nn.ParameterList(
            nn.Parameter(torch.zeros(rows, lora.rank, dtype=dtype, device=device)) for rows in parts
        )
        with torch.no_grad():
            bound = 1 / math.sqrt(in_features)
            # Drawn on the CPU: the same seed gives the same adapter on every device.
            self.lora_A.copy_(torch.empty(self.lora_A.shape).uniform_(-bound, bound))

    @property
    def bias(self) -> nn.Parameter | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.base.packed is not None and torch.is_grad_enabled():
            out = frozen_quantized_linear(x, self.base.packed, self.base.bias)
        else:
            out = self.base(x)
        down = linear(dropout(x, self.lora.dropout, self.training), self.lora_A.to(x.dtype))
        down = down.mul_(self.lora.scale)  # [tokens, parts * rank]: the smallest tensor to scale
        ups = [
            linear(d, b.to(x.dtype)) for d, b in zip(torch.split(down, self.lora.rank, -1), self.lora_B, strict=True)
        ]
        return out + (ups[0] if len(ups) == 1 else torch.cat(ups, -1))

    def delta(self) -> Tensor:
        """What the adapter adds to the base's weight: float32 [out, in]."""
        downs = torch.split(self.lora_A.float(), self.lora.rank)
        return torch.cat([b.float() @ a for a, b in zip(downs, self.lora_B, strict=True)]) * self.lora.scale


class TokenRows(nn.Module):
    """Trained rows of the embedding and the head, for tokens that a base model does not know yet.

    The frozen tables hold the rows' values (`write`), so that the forward pass needs nothing else; `pull` lets the
    embedding's gradient reach them, and the loss gives the head's rows theirs.
    """

    token_ids: Tensor

    def __init__(self, model: Transformer, token_ids: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        table, device = model.embed_tokens.weight, device_of(model)
        self.register_buffer("token_ids", torch.tensor(sorted(set(token_ids)), device=device), persistent=False)
        self.embed_tokens = nn.Parameter(table.detach()[self.token_ids.to(table.device)].to(device, dtype))
        self.lm_head = None
        if model.lm_head is not None:
            head = head_weight(model).detach()
            self.lm_head = nn.Parameter(head[self.token_ids].to(dtype))

    def pull(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """x = embedding of input_ids: the same values, through which gradients reach the rows."""
        where = torch.searchsorted(self.token_ids, input_ids).clamp_(max=len(self.token_ids) - 1)
        trained = (self.token_ids[where] == input_ids)[..., None]
        rows = (self.embed_tokens - self.embed_tokens.detach()).to(x.dtype)[where]
        return x + rows * trained

    @property
    def head_rows(self) -> nn.Parameter:
        return self.embed_tokens if self.lm_head is None else self.lm_head

    @torch.no_grad()
    def write(self, model: Transformer) -> None:
        """Put the rows into the tables that the network reads."""
        table = model.embed_tokens.weight
        table[self.token_ids.to(table.device)] = self.embed_tokens.to(table.device, table.dtype)
        if self.lm_head is not None:
            head = head_weight(model)
            head[self.token_ids] = self.lm_head.to(head.dtype)


def device_of(model: Transformer) -> torch.device:
    """Where the network computes; its embedding may lie elsewhere (`offload.park_embedding`)."""
    return model.norm.weight.device


def head_weight(model: Transformer) -> Tensor:
    """The weight [vocab, hidden] that makes logits: the head's, or the embedding's when they are tied."""
    if model.lm_head is None:
        return model.embed_tokens.weight
    if model.lm_head.weight is None:
        raise UsageError("A quantized head has no gradient.", "Leave --head-precision out.")
    return model.lm_head.weight


def freeze(model: Transformer) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def add_lora(model: Transformer, lora: LoRA, dtype: torch.dtype = torch.float32) -> None:
    """Freeze the network and put an adapter of `dtype` on every linear layer of its blocks. Draws torch's CPU RNG."""
    freeze(model)
    for module, parts, in_features in adapted_linears(model):
        base = model.get_submodule(module)
        assert isinstance(base, Linear)
        model.set_submodule(module, LoRALinear(base, parts, lora, in_features, dtype))


def adapted_linears(model: Transformer) -> list[tuple[str, tuple[int, ...], int]]:
    """(canonical module, output rows of its published parts, inputs) of every linear layer in the blocks."""
    config = model.config
    layout = layout_of(config, gguf=False)
    shapes = dict(zip(LINEARS, config.layer_linears(), strict=True))
    found = []
    for layer in range(config.num_layers):
        for name, shape in shapes.items():
            module = f"layers.{layer}.{name}"
            pieces = pieces_of(module, shape.out_features, config, layout)
            found.append((module, tuple(p.stop - p.start for p in pieces), shape.in_features))
    return found


def lora_layers(model: Transformer) -> dict[str, LoRALinear]:
    """The adapted layers by canonical name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def train_tables(model: Transformer) -> None:
    """Train the whole embedding and head: the official script's LoRA (emb)."""
    model.embed_tokens.weight.requires_grad_(True)
    head_weight(model).requires_grad_(True)


def train_rows(model: Transformer, token_ids: list[int], dtype: torch.dtype = torch.float32) -> None:
    """Train only these tokens' rows of embedding and head. Raises UsageError for an id outside the vocabulary."""
    outside = [i for i in token_ids if not 0 <= i < model.config.vocab_size]
    if outside or not token_ids:
        raise UsageError(f"New tokens must be ids below {model.config.vocab_size}, not {outside}.")
    model.token_rows = TokenRows(model, token_ids, dtype)


def token_rows(model: Transformer) -> TokenRows | None:
    rows = getattr(model, "token_rows", None)
    assert rows is None or isinstance(rows, TokenRows)
    return rows


def trained_parameters(model: Transformer) -> dict[str, nn.Parameter]:
    """What an optimizer sees, by name, in the network's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def merge_into(model: Transformer) -> None:
    """Add every adapter to its plain base weight and take the adapter away. Raises UsageError for packed weights."""
    for name, layer in lora_layers(model).items():
        weight = layer.base.weight
        if weight is None:
            raise UsageError(
                "An adapter cannot be merged into int4 or int8 weights.", "Merge onto the 16-bit base model."
            )
        weight.copy_(weight.float() + layer.delta())
        model.set_submodule(name, layer.base)
