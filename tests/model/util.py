"""Golden checkpoints as our network, and a small driver that runs sequences through the paged cache."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from qwenfit.checkpoint.config_json import config_from_dict
from qwenfit.checkpoint.names import canonical_parameters, layout_of, pieces_of
from qwenfit.config import ModelConfig
from qwenfit.model.batch import Chunk, make_batch
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.transformer import Transformer

Tensors = dict[str, torch.Tensor]
BLOCK_SIZE = 16


def load_config(folder: Path) -> ModelConfig:
    return config_from_dict(json.loads((folder / "config.json").read_text()), name=folder.name)


def fill(model: Transformer, stored: Tensors) -> Transformer:
    """Put a published checkpoint's tensors into the network, concatenated as the name map says."""
    layout = layout_of(model.config, gguf=False)
    state = {}
    for name, shape in canonical_parameters(model.config).items():
        module, _, kind = name.rpartition(".")
        pieces = pieces_of(module, shape[0], model.config, layout)
        state[name] = torch.cat([stored[f"{piece.stored}.{kind}"] for piece in pieces])
    model.load_state_dict(state)
    return model.eval()


def load_golden(folder: Path) -> Transformer:
    return fill(Transformer(load_config(folder)), load_file(folder / "model.safetensors"))


def random_model(config: ModelConfig, seed: int) -> Transformer:
    """Weights that make attention peaked and logits spread, as in the golden models."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            width = parameter.shape[-1]
            spread = 0.1 if parameter.dim() == 1 else 1.0 if "embed" in name else 1.6 * width**-0.5
            parameter.normal_(1.0 if "norm" in name else 0.0, spread, generator=generator)
    return model.eval()


class Paged:
    """Sequences of one model on one cache. Blocks are handed out in an order that scatters every sequence."""

    def __init__(self, model: Transformer, num_tokens: int, dtype: str = "fp32", scatter: bool = True) -> None:
        self.model = model
        blocks = -(-num_tokens // BLOCK_SIZE)
        self.cache = KVCache(model.config, blocks, BLOCK_SIZE, dtype)
        generator = torch.Generator().manual_seed(blocks)
        order = torch.randperm(blocks, generator=generator) if scatter else torch.arange(blocks).flip(0)
        self.free = order.tolist()
        self.tables: dict[str, list[int]] = {}
        self.cached: dict[str, int] = {}
        self.alphas: dict[str, float] = {}

    def chunk(self, name: str, ids: list[int], prompt_length: int | None = None, logits: str = "all") -> Chunk:
        """The next tokens of sequence `name`; its first chunk fixes the NTK alpha from `prompt_length`."""
        cached = self.cached.get(name, 0)
        if cached == 0:
            self.alphas[name] = self.model.config.ntk_alpha(prompt_length or len(ids))
            self.tables[name] = []
        table = self.tables[name]
        while len(table) * BLOCK_SIZE < cached + len(ids):
            table.append(self.free.pop())
        self.cached[name] = cached + len(ids)
        return Chunk(ids, cached, list(table), self.alphas[name], logits)

    @torch.no_grad()
    def run(self, *chunks: Chunk) -> torch.Tensor:
        """One step: the logits that the chunks ask for, [n, vocab]."""
        batch = make_batch(chunks, BLOCK_SIZE)
        return self.model.logits(self.model(batch, self.cache, batch.logits_indices))

    def feed(self, name: str, prompt: list[int], new_ids: list[int]) -> torch.Tensor:
        """Prefill `prompt`, then decode feeding `new_ids`: row k is what chose new_ids[k], [len(new_ids), vocab]."""
        rows = [self.run(self.chunk(name, prompt, logits="last"))]
        rows += [self.run(self.chunk(name, [token])) for token in new_ids[:-1]]
        return torch.cat(rows)


def max_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual - expected).detach().abs().max())
