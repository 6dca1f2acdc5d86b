"""Runs the network on what the scheduler chose: one ragged batch, no padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from qwenfit.engine.brought import Brought
from qwenfit.engine.copies import tensor_of, to_device
from qwenfit.engine.costs import Costs
from qwenfit.engine.padding import padded
from qwenfit.engine.request import Request
from qwenfit.model.batch import Batch
from qwenfit.model.kv_cache import PARITY, KVCache

if TYPE_CHECKING:
    from qwenfit.engine.graphs import DecodeGraphs
    from qwenfit.engine.mixed_graphs import MixedGraphs
    from qwenfit.engine.prompt_graphs import PromptGraphs
    from qwenfit.model.transformer import Transformer


class Network(Protocol):
    """What the engine needs of a model: `qwenfit.model.transformer.Transformer`, or a test's stand-in."""

    def forward(self, batch: Batch, cache: KVCache, rows: Tensor | None, /) -> Tensor:
        """Hidden states of `rows` (int64; None: of all tokens) after the final norm, [rows, hidden_size].

        Keys and values go to the batch's slots.
        """
        ...

    def logits(self, hidden: Tensor, /) -> Tensor:
        """float32 [rows, vocab_size]."""
        ...


def _fused(model: Network, cache: KVCache, device: torch.device) -> bool:
    """Whether the model and the cache are ones that the fused steps on a GPU know."""
    if device.type != "cuda" or cache.dtype == PARITY:
        return False
    from qwenfit.model.transformer import Transformer

    return isinstance(model, Transformer)


def _plain(model: Transformer) -> bool:
    """Whether no layer is of another kind, as an adapter beside quantized weights is."""
    from qwenfit.model.linear import Linear

    return all(isinstance(module, Linear) for name, module in model.named_modules() if name.endswith("_proj"))


def _up(count: int) -> int:
    """The next multiple of 16: a kernel compiled for one serves all."""
    return -(-count // 16) * 16


def _decodes(request: Request) -> bool:
    """Whether the step computes the request's last token and nothing before it."""
    return request.scheduled == 1 and request.computed + 1 == request.length


def _whole(request: Request) -> bool:
    """Whether the step computes all of the request, by tokens that the host knows and frequencies as they are."""
    return request.scheduled == request.length and not request.pending and request.alpha == 1.0


@dataclass(slots=True)
class Ready:
    """The step that the inputs of a graph stand for: the next token of the same requests, from blocks known to it."""

    requests: list[Request]
    computed: list[int]  # tokens of each then
    likeliest: bool  # whether each takes its likeliest token, as it then goes on to

    def new_blocks(self, requests: list[Request]) -> list[Request] | None:
        """Those of `requests` whose next token begins a block; None: it is not their step.

        A request that has been let in again has none of its blocks in the tables.
        """
        if self.requests != requests or self.computed != [request.computed for request in requests]:
            return None
        grown = [request for request in requests if len(request.blocks) != request.blocks_in_table]
        return grown if all(len(request.blocks) - 1 == request.blocks_in_table > 0 for request in grown) else None


class Runner:
    """Keeps a block table row for each request that runs, so that a step writes only what is new in it.

    greedy: the choice with which a recorded step ends, as `DecodeGraphs` takes it.
    """

    def __init__(
        self,
        model: Network,
        cache: KVCache,
        *,
        max_num_seqs: int,
        max_batched_tokens: int,
        max_model_len: int,
        device: torch.device,
        greedy: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.model = model
        self.cache = cache
        self.block_size = cache.block_size
        self.device = device
        self._greedy = greedy
        self._graphs: DecodeGraphs | None = None
        self._mixed: MixedGraphs | None = None
        self.pads = False  # whether a step with prompts is padded to numbers of rows whose products are loaded
        self._ready: Ready | None = None  # None: the next step's inputs come from the host
        self._drawn: Ready | None = None  # the same, once the sampler has chosen the last step's tokens
        self._prompts: PromptGraphs | None = None
        self._transformer: Transformer | None = None  # what the fused steps take; None: they are not for this model
        self._last = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)  # token by row, for those pending
        width = _up(-(-max_model_len // cache.block_size))
        self._tables = torch.zeros(max_num_seqs, width, dtype=torch.int32)
        if _fused(model, cache, device):
            self._transformer = cast("Transformer", model)
            self._warm_up(self._transformer, max_num_seqs, max_batched_tokens)

    def _warm_up(self, model: Transformer, max_num_seqs: int, max_batched_tokens: int) -> None:
        """Compile and record at the start what would stop the requests later. The cache is still empty."""
        from qwenfit.engine.graphs import DecodeGraphs
        from qwenfit.engine.mixed_graphs import MixedGraphs
        from qwenfit.engine.prompt_graphs import PromptGraphs
        from qwenfit.engine.warm_up import compile_many_rows, compile_prompts, load_products
        from qwenfit.kernels.triton.launch import compile_side_by_side
        from qwenfit.model.batch import Chunk, make_batch
        from qwenfit.model.prefill import prefill

        size, width, on_gpu = self.block_size, self._tables.shape[1], self.device.type == "cuda"
        # A decoded token, and the second part of a prompt.
        chunks = [Chunk([0], 1, [0] * width), Chunk([0] * size, size, [0, 1, *[0] * (width - 2)])]
        batch = make_batch(chunks, size, self.device) if self.cache.num_blocks >= 2 else None
        graphs = prompts = mixed = None
        if _plain(model):
            graphs = DecodeGraphs(model, self.cache, max_num_seqs, width, self.device, self._greedy, self._last)
            prompts = PromptGraphs(model, self.cache, graphs, self.device)
            self.pads = max_num_seqs > 1
            if self.pads:
                mixed = MixedGraphs(model, self.cache, graphs, max_batched_tokens, self._last)

        def step() -> object:
            return None if batch is None else prefill(model, batch, self.cache, batch.logits_indices)

        def launch_prompts() -> None:
            compile_prompts(model, self.cache, self.device)
            compile_many_rows(model, self.device)
            step()
            if self.pads and on_gpu:
                load_products(model, self.cache, max_batched_tokens, max_num_seqs)

        def launch_each() -> None:
            if graphs is not None:
                graphs.launch_each()
            if prompts is not None and on_gpu:
                prompts.launch_each()
            launch_prompts()
            if batch is not None:  # one row fewer, which int4 and int8 weights multiply by other kernels
                few = make_batch([chunks[0], replace(chunks[1], token_ids=[0] * (size - 1))], size, self.device)
                prefill(model, few, self.cache, few.logits_indices)
            if mixed is not None and on_gpu:
                mixed.launch_each()

        compile_side_by_side(launch_each)
        launch_prompts()
        if graphs is not None and prompts is not None:
            graphs.record()
            if mixed is not None and batch is not None and on_gpu:
                mixed.record(Costs.measured(step, self.cache))
            self._graphs, self._prompts, self._mixed = graphs, prompts, mixed

    def run(self, requests: list[Request]) -> tuple[Tensor | None, Tensor | None]:
        """Compute each request's scheduled tokens.

        Returns float32 logits with one row for each request that this brings to its last token, in order; None when
        there is none (only parts of prompts). Also the tokens that they take, int64, where every one takes its
        likeliest and the device has chosen it: the next step finds it already. Both are valid until then.
        """
        ready, self._ready = self._ready, None  # an exception leaves None
        self._drawn = None
        if self._graphs is not None:
            made = self._decode_on(self._graphs, requests, ready)
            if made is not None:
                return made
            count = next((i for i, request in enumerate(requests) if not _decodes(request)), len(requests))
            if count == len(requests) and self._graphs.fits(count):
                return self._decode(self._graphs, requests)
        return self._compute(requests), None

    @torch.inference_mode()
    def _compute(self, requests: list[Request]) -> Tensor | None:
        """The logits of a step with prompts in it, or of one that no graph runs."""
        size = self._prompt_size(requests)
        if self._prompts is not None and size is not None:
            first = requests[0]
            return self._prompts.run(size, first.tokens, self._slots(first.blocks, 0, first.length))
        brought = self._brought(requests)
        reached = len(brought.last)
        recorded = self._replay_mixed(self._mixed, requests, brought) if self._mixed is not None else None
        if recorded is not None:
            return recorded[:reached] if reached else None
        batch = self._batch(requests, brought)
        rows = batch.logits_indices
        if self._transformer is not None:
            from qwenfit.model.prefill import prefill

            hidden = prefill(self._transformer, batch, self.cache, rows)
        else:
            every = len(rows) == len(batch.input_ids) and not self.pads
            hidden = self.model.forward(batch, self.cache, None if every else rows)
        return self.model.logits(hidden)[:reached] if reached else None

    def _replay_mixed(self, graphs: MixedGraphs, requests: list[Request], brought: Brought) -> Tensor | None:
        """The logits of a step with prompts in it, as one replay; None: it is to be launched."""
        if any(request.alpha != 1.0 for request in requests):
            return None
        count = brought.singles
        step = graphs.take(len(brought.ids), sum(request.computed for request in requests[:count]))
        if step is None or not step.fits(brought):
            return None
        contexts = (
            self._slots(request.blocks, 0, request.computed + request.scheduled) for request in requests[count:]
        )
        tables = self._block_tables(requests[:count]).contiguous() if count else torch.zeros(0, 0, dtype=torch.int32)
        step.fill(brought, tables, [*chain.from_iterable(contexts)])
        return graphs.replay(step)

    def _prompt_size(self, requests: list[Request]) -> int | None:
        """The length of the recorded prompt that the requests are; None: there is none for them."""
        if self._prompts is None or len(requests) != 1 or not _whole(requests[0]):
            return None
        return self._prompts.size_for(requests[0].length)

    @torch.inference_mode()
    def keep(self, requests: list[Request], tokens: Tensor) -> None:
        """Keep the tokens int64 [n] that `requests` were given on the device, where their next step finds them.

        Not for tokens that came from `run`.
        """
        if self._graphs is not None and self._drawn is not None and self._drawn.requests == requests:
            self._graphs.take(tokens)
            self._ready = self._drawn
        else:
            rows = to_device(torch.tensor([request.row for request in requests]), self.device)
            self._last[rows] = tokens.clamp(min=0)

    def _ids(self, numbers: Tensor) -> Tensor:
        """Token ids, where `-1 - row` stands for the pending token of the request in that row."""
        return numbers.where(numbers >= 0, self._last[(-1 - numbers).clamp_(min=0)])

    def _decode(self, graphs: DecodeGraphs, requests: list[Request]) -> tuple[Tensor, Tensor | None]:
        """`run` for requests that bring one token each, as one replay of a CUDA graph."""
        logits, tokens = self._fill_and_run(graphs, requests)
        likeliest = all(request.takes_likeliest for request in requests)
        return self._decoded(Ready(requests, [request.computed + 1 for request in requests], likeliest), logits, tokens)

    @torch.inference_mode()
    def _decode_on(
        self, graphs: DecodeGraphs, requests: list[Request], ready: Ready | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """`_decode` where the graph's inputs stand for that step, but for blocks that it begins; None: they do not."""
        grown = None if ready is None else ready.new_blocks(requests)
        if ready is None or grown is None:
            return None
        new = None
        if grown:
            self._update_tables(grown)
            at = {request: i for i, request in enumerate(requests)}
            numbers = [
                *(at[request] for request in grown),
                *(len(request.blocks) - 1 for request in grown),
                *(request.blocks[-1] for request in grown),
            ]
            new = to_device(tensor_of(numbers).view(3, -1), self.device)
        logits, tokens = graphs.run_next(new)
        likeliest = ready.likeliest or all(request.takes_likeliest for request in requests)
        return self._decoded(Ready(requests, [count + 1 for count in ready.computed], likeliest), logits, tokens)

    def _decoded(self, after: Ready, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """What a graph gave, as `run` returns it; `after`: the step that its inputs stand for then."""
        if not after.likeliest:
            self._drawn = after
            return logits, None
        self._ready = after
        return logits, tokens

    @torch.inference_mode()
    def _fill_and_run(self, graphs: DecodeGraphs, requests: list[Request]) -> tuple[Tensor, Tensor]:
        tables = self._block_tables(requests).contiguous()
        computed = tensor_of([request.computed for request in requests])
        blocks = tables.gather(1, (computed // self.block_size)[:, None])[:, 0].long()
        numbers = (
            tensor_of([-1 if request.pending else request.tokens[-1] for request in requests]),
            computed,
            blocks * self.block_size + computed % self.block_size,
            computed + 1,
            tensor_of([request.row for request in requests]),
        )
        on_device = to_device(torch.stack(numbers), self.device)
        return graphs.run(on_device, to_device(tables, self.device), [request.alpha for request in requests])

    def _batch(self, requests: list[Request], brought: Brought) -> Batch:
        """What the requests brought, and, where the runner pads, a sequence of padding that the cache keeps nothing of.

        The rows whose logits are wanted are padded too, with the last of them.
        """
        ids, positions, slots, last = brought.ids, brought.positions, brought.slots, brought.last
        query_lens, context_lens = brought.query_lens, brought.context_lens
        alphas = [request.alpha for request in requests]
        tables = self._block_tables(requests)
        if self.pads:
            padding = padded(len(ids)) - len(ids)
            ids += [0] * padding
            positions += range(padding)
            slots += [-1] * padding
            last += last[-1:] * (padded(len(last)) - len(last))
            if padding:
                query_lens.append(padding)
                context_lens.append(padding)
                alphas.append(alphas[-1])
                wider = max(0, _up(-(-padding // self.block_size)) - tables.shape[1])
                tables = pad(tables, (0, wider, 0, 1))
        # One copy to the device for the four of them; each starts at a multiple of 16 numbers, as kernels like it.
        count, gap = len(ids), [0] * (_up(len(ids)) - len(ids))
        numbers = to_device(tensor_of([*ids, *gap, *positions, *gap, *slots, *gap, *last]), self.device)
        input_ids, position_ids, slot_ids = (part[:count] for part in numbers[: 3 * _up(count)].view(3, -1))
        indices = numbers[3 * _up(count) :]
        return Batch(
            input_ids=self._ids(input_ids) if any(request.pending for request in requests) else input_ids,
            positions=position_ids,
            query_lens=query_lens,
            context_lens=context_lens,
            block_tables=to_device(tables, self.device),
            slots=slot_ids,
            ntk_alphas=alphas,
            logits_indices=indices,
        )

    def _brought(self, requests: list[Request]) -> Brought:
        """What the requests bring to a step."""
        made = Brought([], [], [], [], [], [])
        for request in requests:
            start, end = request.computed, request.computed + request.scheduled
            made.ids.extend([-1 - request.row] if request.pending else request.tokens[start:end])
            made.positions.extend(range(start, end))
            made.slots.extend(self._slots(request.blocks, start, end))
            made.query_lens.append(end - start)
            made.context_lens.append(end)
            if end == request.length:
                made.last.append(len(made.ids) - 1)
        return made

    def _slots(self, blocks: list[int], start: int, end: int) -> list[int]:
        """Where the keys and values of the tokens from `start` to `end` go: block * block_size + offset."""
        size = self.block_size
        if end == start + 1:
            return [blocks[start // size] * size + start % size]
        first = start // size
        whole = chain.from_iterable(range(b * size, b * size + size) for b in blocks[first : (end - 1) // size + 1])
        return list(whole)[start - first * size : end - first * size]

    def _block_tables(self, requests: list[Request]) -> Tensor:
        """int32 [requests, blocks of the longest and up to 15 more]; beyond a request's own they mean nothing."""
        self._update_tables([request for request in requests if len(request.blocks) != request.blocks_in_table])
        longest = max(len(request.blocks) for request in requests)
        if len(requests) == 1:
            row = requests[0].row
            return self._tables[row : row + 1, : _up(longest)]
        return self._tables[:, : _up(longest)].index_select(0, tensor_of([request.row for request in requests]))

    def _update_tables(self, grown: list[Request]) -> None:
        """Enter the blocks of `grown` that the tables do not have."""
        rows: list[int] = []
        columns: list[int] = []
        blocks: list[int] = []
        for request in grown:
            known, count = request.blocks_in_table, len(request.blocks)
            rows += [request.row] * (count - known)
            columns += range(known, count)
            blocks += request.blocks[known:]
        if rows:
            self._tables[tensor_of(rows), tensor_of(columns)] = tensor_of(blocks).int()
        for request in grown:  # not before: an interrupted step is taken again
            request.blocks_in_table = len(request.blocks)
