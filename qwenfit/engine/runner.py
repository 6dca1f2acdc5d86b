"""Runs the network on what the scheduler chose: one ragged batch, no padding."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from qwenfit.engine.request import Request
from qwenfit.engine.sampler import to_device
from qwenfit.model.batch import Batch
from qwenfit.model.kv_cache import PARITY, KVCache

if TYPE_CHECKING:
    from qwenfit.engine.graphs import DecodeGraphs


class Network(Protocol):
    """What the engine needs of a model: `qwenfit.model.transformer.Transformer`, or a test's stand-in."""

    def forward(self, batch: Batch, cache: KVCache, /) -> Tensor:
        """Hidden states after the final norm, [tokens, hidden_size]; keys and values go to the batch's slots."""
        ...

    def logits(self, hidden: Tensor, /) -> Tensor:
        """float32 [rows, vocab_size]."""
        ...


def _decode_graphs(model: Network, cache: KVCache, max_blocks: int, device: torch.device) -> DecodeGraphs | None:
    """CUDA graphs of the decoding step, where the model and the cache are ones that its kernels know."""
    if device.type != "cuda" or cache.dtype == PARITY:
        return None
    from qwenfit.engine.graphs import DecodeGraphs
    from qwenfit.model.linear import Linear
    from qwenfit.model.transformer import Transformer

    if not isinstance(model, Transformer):
        return None
    # An adapter beside quantized weights is a layer of another kind.
    if not all(isinstance(m, Linear) for name, m in model.named_modules() if name.endswith("_proj")):
        return None
    return DecodeGraphs(model, cache, max_blocks, device)


def _decodes(request: Request) -> bool:
    """Whether the step computes the request's last token and nothing before it."""
    return request.scheduled == 1 and request.computed + 1 == request.length


class Runner:
    """Keeps a block table row for each request that runs, so that a step writes only what is new in it."""

    def __init__(
        self,
        model: Network,
        cache: KVCache,
        *,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
    ) -> None:
        self.model = model
        self.cache = cache
        self.block_size = cache.block_size
        self.device = device
        self._graphs = _decode_graphs(model, cache, -(-max_model_len // cache.block_size), device)
        self._last = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)  # token by row, for those pending
        self._tables = torch.zeros(max_num_seqs, -(-max_model_len // cache.block_size), dtype=torch.int32)

    @torch.inference_mode()
    def run(self, requests: list[Request]) -> Tensor | None:
        """Compute each request's scheduled tokens.

        Returns float32 logits with one row for each request that this brings to its last token, in order; None when
        there is none (only parts of prompts).
        """
        if self._graphs is not None and self._graphs.fits(len(requests)) and all(map(_decodes, requests)):
            return self._decode(self._graphs, requests)
        batch = self._batch(requests)
        hidden = self.model.forward(batch, self.cache)
        rows = len(batch.logits_indices)
        if rows == 0:
            return None
        return self.model.logits(hidden if rows == len(hidden) else hidden[batch.logits_indices])

    @torch.inference_mode()
    def keep(self, requests: list[Request], tokens: Tensor) -> None:
        """Keep the tokens int64 [n] that `requests` were given on the device, where their next step finds them."""
        rows = to_device(torch.tensor([request.row for request in requests]), self.device)
        self._last[rows] = tokens.clamp(min=0)

    def _ids(self, numbers: Tensor) -> Tensor:
        """Token ids, where `-1 - row` stands for the pending token of the request in that row."""
        return numbers.where(numbers >= 0, self._last[(-1 - numbers).clamp_(min=0)])

    def _decode(self, graphs: DecodeGraphs, requests: list[Request]) -> Tensor:
        """The same for requests that bring one token each, as one replay of a CUDA graph."""
        numbers = [
            [-1 - request.row if request.pending else request.tokens[-1] for request in requests],
            [request.computed for request in requests],
            [self._slots(request.blocks, request.computed, request.computed + 1)[0] for request in requests],
            [request.computed + 1 for request in requests],
        ]
        on_device = to_device(torch.tensor(numbers), self.device)
        if any(request.pending for request in requests):
            on_device[0] = self._ids(on_device[0])
        tables = self._block_tables(requests).pin_memory()
        return graphs.run(on_device, tables, [request.alpha for request in requests])

    def _batch(self, requests: list[Request]) -> Batch:
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last: list[int] = []
        for request in requests:
            start, end = request.computed, request.computed + request.scheduled
            ids += [-1 - request.row] if request.pending else request.tokens[start:end]
            positions += range(start, end)
            slots += self._slots(request.blocks, start, end)
            if end == request.length:
                last.append(len(ids) - 1)
        # One copy to the device for the four of them.
        count = len(ids)
        numbers = to_device(torch.tensor([*ids, *positions, *slots, *last]), self.device)
        input_ids, position_ids, slot_ids, indices = torch.split(numbers, [count, count, count, len(last)])
        return Batch(
            input_ids=self._ids(input_ids) if any(request.pending for request in requests) else input_ids,
            positions=position_ids,
            query_lens=[request.scheduled for request in requests],
            context_lens=[request.computed + request.scheduled for request in requests],
            block_tables=to_device(self._block_tables(requests), self.device),
            slots=slot_ids,
            ntk_alphas=[request.alpha for request in requests],
            logits_indices=indices,
        )

    def _slots(self, blocks: list[int], start: int, end: int) -> list[int]:
        """Where the keys and values of the tokens from `start` to `end` go: block * block_size + offset."""
        size = self.block_size
        if end == start + 1:
            return [blocks[start // size] * size + start % size]
        first = start // size
        whole = chain.from_iterable(range(b * size, b * size + size) for b in blocks[first : (end - 1) // size + 1])
        return list(whole)[start - first * size : end - first * size]

    def _block_tables(self, requests: list[Request]) -> Tensor:
        """int32 [requests, blocks of the longest]; beyond a request's own blocks the entries mean nothing."""
        longest = 0
        for request in requests:
            count = len(request.blocks)
            if request.blocks_in_table != count:
                new = torch.tensor(request.blocks[request.blocks_in_table :], dtype=torch.int32)
                self._tables[request.row, request.blocks_in_table : count] = new
                request.blocks_in_table = count
            longest = max(longest, count)
        if len(requests) == 1:
            row = requests[0].row
            return self._tables[row : row + 1, :longest]
        return self._tables[:, :longest][[request.row for request in requests]]
