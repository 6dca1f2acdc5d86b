"""CUDA graphs of the decoding step, one for each size of batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from qwenfit.kernels.triton.step_inputs import StepBuffers, fill_step
from qwenfit.model.decode import DecodeStep
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.transformer import Transformer

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)


class DecodeGraphs:
    """Replays a decoding step of any size up to `max_batch`; a batch is padded to the next of SIZES.

    All graphs share one pool of memory, since only one runs at a time, and one buffer of logits.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, max_batch: int, max_blocks: int, device: torch.device
    ) -> None:
        self.model, self.cache, self.max_blocks, self.device = model, cache, max_blocks, device
        self.sizes = [size for size in SIZES if size < max_batch]
        self.sizes += [size for size in SIZES if size >= max_batch][:1]
        self.pool: Any = None  # torch's handle of the memory that all graphs share
        self._recorded: dict[int, tuple[DecodeStep, torch.cuda.CUDAGraph]] = {}
        self._logits = torch.empty(self.sizes[-1], model.config.vocab_size, device=device)

    def fits(self, batch: int) -> bool:
        return batch <= self.sizes[-1]

    def record(self) -> None:
        """Record all sizes, the largest first: the memory that it takes serves the others too."""
        for size in reversed(self.sizes):
            self._record(size)

    def run(
        self, numbers: torch.Tensor, block_tables: torch.Tensor, last: torch.Tensor, alphas: Sequence[float]
    ) -> torch.Tensor:
        """float32 logits [batch, vocab_size], valid until the next call.

        numbers, block_tables and last as `fill_step` takes them; alphas: the NTK alpha of each request.
        """
        batch = numbers.shape[1]
        size = next(size for size in self.sizes if size >= batch)
        step, graph = self._recorded[size]
        buffers = StepBuffers(step.input_ids, step.positions, step.slots, step.context_lens, step.block_tables)
        fill_step(buffers, numbers, block_tables, last)
        step.set_alphas(alphas)
        graph.replay()
        return self._logits[:batch]

    def _record(self, size: int) -> None:
        step = DecodeStep(self.model, self.cache, size, self.max_blocks, self.device)
        step.run()  # compiles the kernels; all rows are padding, so the cache is left alone
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph, pool=self.pool):
            step.run(self._logits[:size])
        self.pool = graph.pool()
        self._recorded[size] = step, graph
