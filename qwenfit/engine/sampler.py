"""From logits to one token per request, for all of them at once.

A draw depends on the request's own logits, parameters, seed and position and on nothing else, so it is the same
alone, in a batch and after a preemption.
"""

from __future__ import annotations

import hashlib
import math
import struct
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwenfit.engine.copies import to_device, to_host
from qwenfit.engine.output import TokenLogprob
from qwenfit.engine.penalties import Penalties
from qwenfit.engine.request import Request

_SORTED_ROWS = 16  # sorted at once: 100 MB for Qwen's vocabulary
_FEW = 64  # tokens that the GPU's kernels draw among, as the defaults of every Qwen after the first ask
_NEVER = -1e37  # a logit that is finite, as those kernels want it, and below all others
BLOCK = 128  # divides the rows of every Qwen's head: 151,936 and 152,064


class Sampler:
    """Draws among the `vocab_size` real tokens; the rows of the head beyond them, and `banned_ids`, never come up.

    It keeps of requests what its `Penalties` do, and the last batch.
    """

    def __init__(
        self,
        vocab_size: int,
        max_num_seqs: int,
        max_model_len: int,
        device: torch.device,
        banned_ids: Sequence[int] = (),
    ) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self._banned = torch.tensor(banned_ids, dtype=torch.int64, device=device) if banned_ids else None
        self._mask: Tensor | None = None  # the same as the greedy kernel wants it
        if self._banned is not None:
            self._mask = torch.zeros(vocab_size, dtype=torch.uint8, device=device).index_fill_(0, self._banned, 1)
        self._penalties = Penalties(max_num_seqs, max_model_len, device)
        self._asked = Asked([])

    @torch.inference_mode()
    def compile(self, width: int) -> None:
        """Have the kernels for logits of `width` ready that steps take: on a GPU, before the first request comes."""
        from qwenfit.kernels.triton.launch import compile_side_by_side
        from qwenfit.kernels.triton.repetition import penalise_repetition
        from qwenfit.kernels.triton.top_k import draw_top_k

        logits = torch.zeros(1, width, device=self.device)
        knobs = torch.tensor([[1.0], [1.0], [1.0], [0.0], [0.0]], dtype=torch.float64, device=self.device)
        given = torch.zeros(4, 1, dtype=torch.int64, device=self.device)  # of no token

        def launch_each() -> None:
            self.greedy(logits)
            for most in (1, _FEW):
                draw_top_k(logits, self.vocab_size, knobs, most, self._mask)
            penalise_repetition(logits, torch.zeros(1, 16, dtype=torch.int32, device=self.device), given, 16)

        compile_side_by_side(launch_each)
        launch_each()

    @torch.inference_mode()
    def choose(self, logits: Tensor, requests: list[Request], likeliest: Tensor | None = None) -> Chosen:
        """One token for each row of `logits` (float32 [n, >= vocab_size], overwritten); the host waits for nothing.

        likeliest: what `greedy` gave already, where every request takes that.
        """
        asked = self._asked_of(requests)
        wanted = list(asked.logprobs)
        logprobs = self._rows(logits, wanted).log_softmax(-1) if wanted else None
        if likeliest is not None:
            tokens = likeliest
        elif logits.is_cuda and asked.all_take_likeliest():
            tokens = self.greedy(logits)
        elif logits.is_cuda and asked.few:
            tokens = self._among_few(logits, requests)
        else:
            tokens = self._general(logits, requests)
        if logprobs is None:
            return Chosen(tokens)
        count = min(max(asked.logprobs.values()), self.vocab_size)
        chosen = logprobs.gather(1, tokens[self._int(wanted)].clamp(min=0)[:, None])[:, 0]
        return Chosen(tokens, asked.logprobs, (chosen, *logprobs[:, : self.vocab_size].topk(count)))

    def greedy(self, logits: Tensor, out: Tensor | None = None) -> Tensor:
        """The likeliest token of each row, int64 [n], -1 where it is not finite; by the GPU's kernel for just that."""
        from qwenfit.kernels.triton.greedy import greedy

        return greedy(logits, self.vocab_size, self._mask, out)

    def _asked_of(self, requests: list[Request]) -> Asked:
        if self._asked.requests != requests:
            self._asked = Asked(requests)
        return self._asked

    def _among_few(self, logits: Tensor, requests: list[Request]) -> Tensor:
        """`_general` where all take one of at most _FEW tokens, in few launches."""
        asked = self._asked_of(requests)
        self._adjust(logits, requests)
        tokens = self._draw_few(logits, asked)
        if asked.penalised:
            self._penalties.append(self._rows(tokens.clamp(min=0), asked.penalised))
        return tokens

    def _draw_few(self, logits: Tensor, asked: Asked) -> Tensor:
        """Draw each row's token among at most _FEW, by the GPU's kernels for just that: no row is sorted."""
        from qwenfit.kernels.triton.top_k import draw_top_k

        return draw_top_k(logits, self.vocab_size, to_device(asked.knobs(), self.device), asked.few, self._mask)

    def _general(self, logits: Tensor, requests: list[Request]) -> Tensor:
        logits[:, self.vocab_size :] = -math.inf
        if self._banned is not None:
            logits.index_fill_(1, self._banned, _NEVER)
        top, ids = row_max(logits)
        finite = top.isfinite()
        if logits.is_cuda:  # as strict as the kernels for greedy choice and for few
            finite &= logits[:, : self.vocab_size].isfinite().all(-1)
        if self._adjust(logits, requests):
            ids = row_max(logits)[1]
        drawn = [i for i, request in enumerate(requests) if not request.params.greedy]
        if drawn:
            self._draw(logits, requests, drawn, ids)
        penalised = self._asked_of(requests).penalised
        if penalised:
            self._penalties.append(self._rows(ids.clamp(min=0), penalised))
        return ids.where(finite, -1)

    def _adjust(self, logits: Tensor, requests: list[Request]) -> bool:
        """Bias, penalties and min_tokens, in place; whether there were any."""
        asked = self._asked_of(requests)
        if asked.biased:
            rows, ids, values = zip(*asked.biased, strict=True)
            logits[self._int(rows), self._int(ids)] += self._tensor(values, torch.float32)
        if asked.penalised:
            self._penalties.apply(logits, asked.penalised, [requests[i] for i in asked.penalised])
        early = [(i, t) for i in asked.held if requests[i].is_early for t in requests[i].stop_ids]
        if early:
            rows, ids = zip(*early, strict=True)
            logits[self._int(rows), self._int(ids)] = _NEVER
        return bool(asked.biased or asked.penalised or early)

    def _draw(self, logits: Tensor, requests: list[Request], drawn: list[int], ids: Tensor) -> None:
        """Replace `ids` at the rows `drawn` by draws; rows with a filter go through the sorted path.

        On a GPU those that take one of few do not, so that they draw the same in every company.
        """
        few: list[int] = []
        filtered: list[int] = []
        free: list[int] = []
        for i in drawn:
            p = requests[i].params
            if logits.is_cuda and 0 < p.top_k <= _FEW:
                few.append(i)
            else:
                (filtered if p.top_k or p.top_p < 1 or p.min_p else free).append(i)
        if few:
            ids[self._int(few)] = self._draw_few(self._rows(logits, few), Asked([requests[i] for i in few]))
        # How much of a row a filter may keep is only in the logits: a GPU sorts it all, lest the host waits to know.
        with_filter = draw_sorted if logits.is_cuda else draw_filtered
        for rows, choose in ((free, draw), (filtered, with_filter)):
            if rows:
                chosen = [requests[i] for i in rows]
                at = self._int(rows)
                temperature, *knobs = self._floats(
                    chosen,
                    lambda p: p.temperature,
                    lambda p: float(p.top_k),
                    lambda p: max(p.top_p, 1e-30),  # not 0 in float32: the first always stays
                    lambda p: p.min_p,
                )
                picked = self._rows(logits, rows)
                scaled = (picked - picked.amax(-1, keepdim=True)).div_(temperature[:, None])
                u = self._tensor([uniform(r) for r in chosen], torch.float64)
                ids[at] = choose(scaled, u, *knobs)

    def _rows(self, values: Tensor, rows: list[int]) -> Tensor:
        """These rows of `values`; all of them without a copy."""
        return values if len(rows) == len(values) else values[self._int(rows)]

    def _int(self, values: Sequence[int]) -> Tensor:
        return self._tensor(values, torch.int64)

    def _floats(self, requests: list[Request], *knobs: Callable[..., float]) -> Tensor:
        """[knobs, requests]: one copy to the device for all of them."""
        return self._tensor([[knob(r.params) for r in requests] for knob in knobs], torch.float32)

    def _tensor(self, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
        return to_device(torch.tensor(values, dtype=dtype), self.device)


class Asked:
    """What the parameters of a batch ask of its tokens: worked out once for as long as the batch is the same."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests
        params = [request.params for request in requests]
        self.logprobs = {i: p.logprobs for i, p in enumerate(params) if p.logprobs is not None}  # row -> how many
        self.penalised = [i for i, p in enumerate(params) if p.penalised]
        self.biased = [(i, t, b) for i, p in enumerate(params) for t, b in (p.logit_bias or {}).items()]
        self.held = [i for i, p in enumerate(params) if p.min_tokens]
        kept = [1 if p.greedy else p.top_k for p in params]  # tokens that the next is drawn among; 0: no limit
        self.few = max(kept) if kept and min(kept) > 0 and max(kept) <= _FEW else 0  # the most, where all are few
        self._knobs: Tensor | None = None
        self._likeliest = False

    def all_take_likeliest(self) -> bool:
        self._likeliest = self._likeliest or all(request.takes_likeliest for request in self.requests)
        return self._likeliest

    def knobs(self) -> Tensor:
        """float64 [5, n] as `draw_top_k` takes them, for the next tokens; on the CPU, until it is called again."""
        if self._knobs is None:
            greedy = (1.0, 1.0, 1.0, 0.0, 0.0)
            each = [
                greedy if p.greedy else (p.temperature, p.top_k, p.top_p, p.min_p, 0.0)
                for p in (request.params for request in self.requests)
            ]
            self._knobs = torch.tensor(each, dtype=torch.float64).T.contiguous()
        uniforms = array("d", [uniform(request) for request in self.requests])
        self._knobs[4] = torch.frombuffer(uniforms, dtype=torch.float64)
        return self._knobs


class Chosen:
    """What a step chose. The tokens stay on the device for the next step; `read` waits for them.

    Made when the step has been launched: on a GPU it starts the copies to the host that `read` waits for.
    """

    def __init__(
        self, tokens: Tensor, asked: dict[int, int] | None = None, logprobs: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> None:
        """asked: row -> number of likeliest tokens; logprobs: of those rows the chosen token's, and the likeliest."""
        self.tokens = tokens  # int64 [n]; -1 where the logits are not finite. The next step may overwrite them
        self._asked = asked or {}
        self._copies = [to_host(tensor) for tensor in (tokens, *(logprobs or ()))]
        self._event = torch.cuda.Event() if tokens.is_cuda else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record()

    def read(self) -> tuple[list[int], list[TokenLogprob | None] | None]:
        """One token id for each row, -1 where its logits are not finite.

        Also the log-probabilities of the rows that ask for them, None when no row does.
        """
        if self._event is not None:
            self._event.synchronize()
        tokens, *logprobs = (copy.tolist() for copy in self._copies)
        if not self._asked:
            return tokens, None
        result: list[TokenLogprob | None] = [None] * len(tokens)
        for (row, count), chosen, values, ids in zip(self._asked.items(), *logprobs, strict=True):
            result[row] = TokenLogprob(tokens[row], chosen, tuple(zip(ids[:count], values[:count], strict=True)))
        return tokens, result


def row_max(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value of each row and where it is first, [n] and [n]; NaN where the row has one."""
    blocks = in_blocks(logits, -math.inf)
    top, which = blocks.amax(-1).max(-1)
    inside = blocks[torch.arange(len(logits), device=logits.device), which].argmax(-1)
    return top, which * BLOCK + inside


def in_blocks(rows: Tensor, fill: float) -> Tensor:
    """[n, width] -> [n, blocks, BLOCK], a view where BLOCK divides the width.

    On a CPU torch finds a maximum with its index, the k largest or a running sum five to ten times faster by going
    first over blocks and then into those that matter than over a row of 152k at once.
    """
    missing = -rows.shape[1] % BLOCK
    if missing:
        rows = F.pad(rows, (0, missing), value=fill)
    return rows.view(len(rows), -1, BLOCK)


def uniform(request: Request) -> float:
    """A number in [0, 1), a function of the request's seed, which of its answers this is, and the position in it."""
    eight, which = divmod(request.num_generated, 8)
    if request.uniforms_from != eight:
        key = f"{request.seed}/{request.index}/{eight}".encode()
        bits = struct.unpack("<8Q", hashlib.blake2b(key, digest_size=64).digest())
        request.uniforms, request.uniforms_from = [(number >> 12) * 2.0**-52 for number in bits], eight
    return request.uniforms[which]


def draw(scaled: Tensor, u: Tensor, *_: Tensor) -> Tensor:
    """Draw from softmax(scaled), [m, vocab] with 0 the largest of each row, at `u`: float64 [m] in [0, 1)."""
    return invert(scaled.exp(), u)


def invert(weights: Tensor, u: Tensor) -> Tensor:
    """Where each row's cumulative sum first exceeds `u` of its whole: never at a weight of 0. [m, k] and [m] -> [m]."""
    blocks = in_blocks(weights, 0.0)
    which, rest = _first_above(blocks.sum(-1), u)
    inside, _ = _first_above(blocks[torch.arange(len(blocks), device=blocks.device), which], rest)
    return (which * BLOCK + inside).clamp_(max=weights.shape[1] - 1)  # a row of NaN may go past it


def _first_above(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The index where the cumulative sum first exceeds u, and how far into that weight u lies, in [0, 1)."""
    weights = weights.double()
    cumulative = weights.cumsum(-1)
    target = u[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True).clamp_(max=weights.shape[1] - 1)  # NaN goes past it
    weight = weights.gather(1, index)
    rest = (target - (cumulative.gather(1, index) - weight)) / weight
    return index[:, 0], rest[:, 0].clamp_(0.0, 1 - 2.0**-52)


def draw_filtered(scaled: Tensor, u: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """`draw` after top_k, top_p and min_p, each [m].

    Only what any row can keep is sorted: the top_k, where that is set; else what is not below (1 - top_p) / vocab of
    the whole (all such tokens are less than 1 - top_p together), nor below min_p.
    """
    top_k, top_p, min_p = top_k[:, None], top_p[:, None], min_p[:, None]
    total = torch.zeros_like(top_p) if bool((top_k > 0).all()) else scaled.exp().sum(-1, keepdim=True)
    floor = torch.maximum((1 - top_p) * total / scaled.shape[1], min_p).log() - 0.01  # rounding on the safe side
    kept, ids = _largest(scaled, top_k, floor)
    kept = kept.exp().where((top_k == 0) | (torch.arange(kept.shape[1], device=kept.device) < top_k), 0.0)
    total = torch.where(top_k > 0, kept.sum(-1, keepdim=True), total)
    before = kept.cumsum(-1, dtype=torch.float64) - kept
    kept = kept.where(((top_p == 1) | (before < top_p * total)) & (kept >= min_p), 0.0)
    return ids.gather(1, invert(kept, u)[:, None])[:, 0]


def draw_sorted(scaled: Tensor, u: Tensor, *knobs: Tensor) -> Tensor:
    """`draw_filtered` by sorting whole rows: all shapes are known beforehand, so nothing waits for the device."""
    pieces = [slice(start, start + _SORTED_ROWS) for start in range(0, len(scaled), _SORTED_ROWS)]
    return torch.cat([_draw_sorted(scaled[rows], u[rows], *(knob[rows] for knob in knobs)) for rows in pieces])


def _draw_sorted(scaled: Tensor, u: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    top_k, top_p, min_p = top_k[:, None], top_p[:, None], min_p[:, None]
    kept, ids = scaled.sort(descending=True, stable=True)
    kept = kept.exp().where((top_k == 0) | (torch.arange(kept.shape[1], device=kept.device) < top_k), 0.0)
    cumulative = kept.cumsum(-1, dtype=torch.float64)
    before = cumulative - kept
    kept = kept.where(((top_p == 1) | (before < top_p * cumulative[:, -1:])) & (kept >= min_p), 0.0)
    return ids.gather(1, invert(kept, u)[:, None])[:, 0]


def _largest(scaled: Tensor, top_k: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """For each row its top_k largest values, or where top_k is 0 all from `floor` up, and more; sorted, with ids."""

    def most(values: Tensor) -> int:
        needed = torch.where(top_k > 0, top_k, (values >= floor).sum(-1, keepdim=True))
        return max(1, min(int(needed.max()), values.shape[1]))

    blocks = in_blocks(scaled, -math.inf)
    tops = blocks.amax(-1)
    which = tops.topk(most(tops)).indices  # the k largest values lie in the k blocks with the largest tops
    candidates = blocks[torch.arange(len(blocks), device=blocks.device)[:, None], which].flatten(1)
    values, at = candidates.topk(most(candidates))
    return values, which.gather(1, at // BLOCK) * BLOCK + at % BLOCK
