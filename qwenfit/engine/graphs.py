"""CUDA graphs of the decoding step, one for each size of batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from qwenfit.engine.padding import SIZES
from qwenfit.kernels.triton.step_inputs import advance, extend, fill_step
from qwenfit.model.decode import DecodeStep
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.transformer import Transformer

Made = TypeVar("Made")


class DecodeGraphs:
    """Replays a decoding step of any size up to `max_batch`; a batch is padded to the next of SIZES.

    A step ends with the greedy choice (greedy: logits float32 [n, vocab_size] -> tokens int64 [n] in its second
    argument). It keeps the tokens in `last`, int64 [rows], and makes its own inputs those of the next step, which is
    then a replay and nothing else. Where others are drawn, they must be told by `take` before it.

    All graphs share one pool of memory, since only one runs at a time, and one buffer of logits and of tokens.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        max_batch: int,
        max_blocks: int,
        device: torch.device,
        greedy: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        last: torch.Tensor,
    ) -> None:
        self.model, self.cache, self.max_blocks, self.device = model, cache, max_blocks, device
        self._greedy, self._last = greedy, last
        self.sizes = [size for size in SIZES if size < max_batch]
        self.sizes += [size for size in SIZES if size >= max_batch][:1]
        self._steps = {size: self._step(size) for size in reversed(self.sizes)}
        self.pool: Any = None  # torch's handle of the memory that all graphs share
        self._recorded: dict[int, tuple[DecodeStep, torch.cuda.CUDAGraph]] = {}
        self._batch = self._size = 0  # of the last step
        self.logits = torch.empty(self.sizes[-1], model.config.vocab_size, device=device)  # of the last step
        self._tokens = torch.empty(self.sizes[-1], dtype=torch.int64, device=device)

    def fits(self, batch: int) -> bool:
        return batch <= self.sizes[-1]

    def launch_each(self) -> None:
        """Launch every kernel of all sizes, with padding, and those that fill inputs: so that they are compiled."""
        for step in self._steps.values():
            self._run(step, layers=1)
        self._fill_padding()

    def record(self) -> None:
        """Record all sizes, the largest first: the memory that it takes serves the others too."""
        for size, step in self._steps.items():
            self._record(size, step)
        self._fill_padding()

    def _fill_padding(self) -> None:
        step = self._steps[self.sizes[0]]
        padding = torch.tensor([[0], [0], [-1], [0], [0]], device=self.device)
        tables = torch.zeros(1, 16, dtype=torch.int32, device=self.device)
        fill_step(step.buffers, padding, tables[:, : self.max_blocks], self._last)
        extend(step.buffers, padding[:3], self.cache.block_size)

    def run(
        self, numbers: torch.Tensor, block_tables: torch.Tensor, alphas: Sequence[float]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 logits [batch, vocab_size] and the greedy tokens int64 [batch], valid until the next step.

        numbers and block_tables as `fill_step` takes them; alphas: the NTK alpha of each request.
        """
        self._batch = numbers.shape[1]
        self._size = next(size for size in self.sizes if size >= self._batch)
        step, _ = self._recorded[self._size]
        fill_step(step.buffers, numbers, block_tables, self._last)
        step.set_alphas(alphas)
        return self.run_next()

    def run_next(self, new: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The same for the step after the last one: of the same sequences, each with the token that was chosen.

        new: the blocks that the step begins, as `extend` takes them.
        """
        step, graph = self._recorded[self._size]
        if new is not None:
            extend(step.buffers, new, self.cache.block_size)
        graph.replay()
        return self.logits[: self._batch], self._tokens[: self._batch]

    def take(self, tokens: torch.Tensor) -> None:
        """Tokens int64 [batch] that the sequences of the last step get in place of the greedy ones; -1 counts as 0."""
        buffers = self._recorded[self._size][0].buffers
        chosen = tokens.clamp(min=0)
        buffers.input_ids[: self._batch].copy_(chosen)
        self._last.index_copy_(0, buffers.rows[: self._batch], chosen)

    def capture(self, run: Callable[[], Made]) -> tuple[torch.cuda.CUDAGraph, Made]:
        """Record what `run` launches, in the memory that all graphs share; also what it returns."""
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            made = run()
        self.pool = graph.pool()
        return graph, made

    def _step(self, size: int) -> DecodeStep:
        return DecodeStep(self.model, self.cache, size, self.max_blocks, self.device)

    def _record(self, size: int, step: DecodeStep) -> None:
        self._run(step)  # compiles the kernels; all rows are padding, so the cache is left alone
        torch.cuda.synchronize(self.device)
        self._recorded[size] = step, self.capture(lambda: self._run(step))[0]

    @torch.inference_mode()
    def _run(self, step: DecodeStep, layers: int | None = None) -> None:
        """What a graph records; of only some layers, to compile its kernels."""
        size = len(step.buffers.input_ids)
        logits, tokens = self.logits[:size], self._tokens[:size]
        step.run(logits, layers)
        self._greedy(logits, tokens)
        advance(step.buffers, tokens, self._last, self.cache.block_size)
