"""CUDA graphs of the decoding step, one for each size of batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qwenfit.model.decode import DecodeStep
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.transformer import Transformer

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


class DecodeGraphs:
    """Replays a decoding step of any size; a size is recorded when it first comes up.

    A batch is padded to the next size. All graphs share one pool of memory: only one runs at a time.
    """

    def __init__(self, model: Transformer, cache: KVCache, max_blocks: int, device: torch.device) -> None:
        self.model, self.cache, self.max_blocks, self.device = model, cache, max_blocks, device
        self._pool: Any = None  # torch's handle of the memory that all graphs share
        self._recorded: dict[int, tuple[DecodeStep, torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def fits(self, batch: int) -> bool:
        return batch <= SIZES[-1]

    def run(self, numbers: torch.Tensor, block_tables: torch.Tensor, alphas: Sequence[float]) -> torch.Tensor:
        """float32 logits [batch, vocab_size], valid until the next call.

        numbers int64 [4, batch], pinned: token ids, positions, slots and context lengths (with the new token);
        block_tables int32 [batch, up to max_blocks], pinned; alphas: the NTK alpha of each request.
        """
        batch = numbers.shape[1]
        size = next(size for size in SIZES if size >= batch)
        step, graph, logits = self._get(size)
        on_device = numbers.to(self.device, non_blocking=True)
        for buffer, row in zip((step.input_ids, step.positions, step.slots, step.context_lens), on_device, strict=True):
            buffer[:batch].copy_(row)
        step.block_tables[:batch, : block_tables.shape[1]].copy_(block_tables, non_blocking=True)
        if batch < size:
            step.slots[batch:].fill_(-1)
            step.context_lens[batch:].zero_()
        step.set_alphas(alphas)
        graph.replay()
        return logits[:batch]

    def _get(self, size: int) -> tuple[DecodeStep, torch.cuda.CUDAGraph, torch.Tensor]:
        if size not in self._recorded:
            step = DecodeStep(self.model, self.cache, size, self.max_blocks, self.device)
            step.run()  # compiles the kernels; all rows are padding, so the cache is left alone
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                logits = step.run()
            self._pool = graph.pool()
            self._recorded[size] = step, graph, logits
        return self._recorded[size]
