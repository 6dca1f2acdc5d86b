"""Repetition, frequency and presence penalties, by what the device knows: no step waits until another is read."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from qwenfit.engine.copies import tensor_of, to_device
from qwenfit.engine.request import Request


class Penalties:
    """Keeps the token ids of the penalised requests that run. For each step: `apply`, choose, `append`.

    They are int32 [max_num_seqs, max_model_len], made when the first such request comes: 8 MiB for 64 requests of 32k
    tokens, where counts of each of Qwen's 152k tokens would take 37. Beside them a step takes some int64 and float32
    [requests, longest], and for a presence or frequency penalty one float32 [requests, rows of the head].
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, device: torch.device) -> None:
        self.device = device
        self._shape = (max_num_seqs, max_model_len)
        self._tokens: Tensor | None = None  # prompt and answer; beyond a request's own length they mean nothing
        self._columns = torch.empty(0)  # int64 [max_model_len]: 0, 1, 2, ...
        self._next = (self._columns, self._columns)  # row and column of the tokens to `append`

    def apply(self, logits: Tensor, rows: list[int], requests: list[Request]) -> None:
        """Change `logits` at `rows`, one for each request.

        First repetition, over prompt and answer; then frequency and presence, over the answer. A token that occurs
        twice is read twice and written twice with the same value, so none needs to be unique.
        """
        table = self._table(requests)
        longest = max(request.length for request in requests)
        if logits.is_cuda and not any(r.params.frequency_penalty or r.params.presence_penalty for r in requests):
            self._repetition(logits, rows, requests, longest)
            return
        places = [(i, r.row, r.prompt_length, r.length) for i, r in zip(rows, requests, strict=True)]
        row, held, start, end = to_device(torch.tensor(places), self.device).T
        params = [request.params for request in requests]
        knobs = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in params]
        repetition, frequency, presence = to_device(torch.tensor(knobs, dtype=torch.float32), self.device).T[:, :, None]

        seen, at = table[:, :longest][held], self._columns[:longest]
        seen = seen.where(at < end[:, None], seen[:, :1]).long()  # [requests, longest]
        values = logits[row[:, None], seen]
        if any(p.repetition_penalty != 1.0 for p in params):
            values = torch.where(values > 0, values / repetition, values * repetition)
        if any(p.frequency_penalty or p.presence_penalty for p in params):
            answered = ((at >= start[:, None]) & (at < end[:, None])).float()
            counts = logits.new_zeros(len(requests), logits.shape[1]).scatter_add_(1, seen, answered).gather(1, seen)
            values = values - frequency * counts - presence * (counts > 0)
        logits[row[:, None], seen] = values
        self._next = held, end

    def _repetition(self, logits: Tensor, rows: list[int], requests: list[Request], longest: int) -> None:
        """`apply` where there is no other penalty, by the GPU's kernel for just that."""
        from qwenfit.kernels.triton.repetition import penalise_repetition

        assert self._tokens is not None
        penalties = array("d", [r.params.repetition_penalty for r in requests])
        numbers = [*rows, *(r.row for r in requests), *(r.length for r in requests), *array("q", penalties.tobytes())]
        given = to_device(tensor_of(numbers).view(4, -1), self.device)
        penalise_repetition(logits, self._tokens, given, longest)
        self._next = given[1], given[2]

    def append(self, tokens: Tensor) -> None:
        """What was chosen for the requests of the last `apply`, int64 [requests]: their next step finds it there."""
        assert self._tokens is not None
        self._tokens[self._next] = tokens.int()

    def _table(self, requests: list[Request]) -> Tensor:
        """All tokens, those of requests let in since the last step among them; the host still knows all of these."""
        if self._tokens is None:
            self._tokens = torch.zeros(self._shape, dtype=torch.int32, device=self.device)
            self._columns = torch.arange(self._shape[1], device=self.device)
        for request in requests:
            if not request.in_penalties:
                self._tokens[request.row, : request.length] = to_device(tensor_of(request.tokens), self.device)
                request.in_penalties = True
        return self._tokens
