"""Runs the network on what the scheduler chose: one ragged batch, no padding."""

from __future__ import annotations

from itertools import chain
from typing import Protocol

import torch
from torch import Tensor

from qwenfit.engine.request import Request
from qwenfit.model.batch import Batch
from qwenfit.model.kv_cache import KVCache


class Network(Protocol):
    """What the engine needs of a model: `qwenfit.model.transformer.Transformer`, or a test's stand-in."""

    def forward(self, batch: Batch, cache: KVCache, /) -> Tensor:
        """Hidden states after the final norm, [tokens, hidden_size]; keys and values go to the batch's slots."""
        ...

    def logits(self, hidden: Tensor, /) -> Tensor:
        """float32 [rows, vocab_size]."""
        ...


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
        self._tables = torch.zeros(max_num_seqs, -(-max_model_len // cache.block_size), dtype=torch.int32)

    @torch.inference_mode()
    def run(self, requests: list[Request]) -> Tensor | None:
        """Compute each request's scheduled tokens.

        Returns float32 logits with one row for each request that this brings to its last token, in order; None when
        there is none (only parts of prompts).
        """
        batch = self._batch(requests)
        hidden = self.model.forward(batch, self.cache)
        rows = len(batch.logits_indices)
        if rows == 0:
            return None
        return self.model.logits(hidden if rows == len(hidden) else hidden[batch.logits_indices])

    def _batch(self, requests: list[Request]) -> Batch:
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last: list[int] = []
        for request in requests:
            start, end = request.computed, request.computed + request.scheduled
            ids += request.tokens[start:end]
            positions += range(start, end)
            slots += self._slots(request.blocks, start, end)
            if end == len(request.tokens):
                last.append(len(ids) - 1)
        # One copy to the device for the four of them.
        count = len(ids)
        numbers = self._to_device(torch.tensor([*ids, *positions, *slots, *last]))
        input_ids, position_ids, slot_ids, indices = torch.split(numbers, [count, count, count, len(last)])
        return Batch(
            input_ids=input_ids,
            positions=position_ids,
            query_lens=[request.scheduled for request in requests],
            context_lens=[request.computed + request.scheduled for request in requests],
            block_tables=self._to_device(self._block_tables(requests)),
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

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)
