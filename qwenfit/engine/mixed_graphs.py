"""CUDA graphs of steps with prompts in them, for hosts that need longer to launch a step than the device to run it.

A graph is for a number of rows. How many sequences there are, which of them bring one token and which a prompt or a
part of one, and how long each is, it reads from the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, chain

import torch

from qwenfit.engine.brought import Brought
from qwenfit.engine.copies import tensor_of, to_device
from qwenfit.engine.costs import Costs, seconds
from qwenfit.engine.graphs import DecodeGraphs
from qwenfit.kernels.choice import INT_MATMUL_ROWS
from qwenfit.kernels.triton.decode_attention import contexts_in_parts
from qwenfit.kernels.triton.parts import arrival_counters
from qwenfit.kernels.triton.prompt_attention import tiles_of
from qwenfit.kernels.triton.ragged import RaggedPlan, is_own, prompt_config
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.prefill import run_layers
from qwenfit.model.transformer import Transformer

# Rows; each is one that steps are padded to.
SIZES = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048)
USUAL = 256  # tells what the others will take
PROMPTS = 32  # of a step, at most
BEFORE = 2048  # tokens that the prompts of a step may have in the cache already, at most
CONFIG = {"m": 64, "n": 64, "warps": 4, "stages": 2}  # of the attention, where nothing was measured
WIDE_CONFIG = {"m": 32, "n": 32, "warps": 4, "stages": 1}  # for float32


class MixedStep:
    """A step of at most `size` rows, on buffers that stay in place.

    last: int64 [rows], the newest token of each sequence. logits: float32 [n, vocab_size], where those of the step go.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, size: int, max_blocks: int, last: torch.Tensor, logits: torch.Tensor
    ) -> None:
        self.model, self.cache, self.size, self._last, self._logits = model, cache, size, last, logits
        device, heads = last.device, model.config.num_heads
        self.sequences = len(logits)
        self.singles = min(size, self.sequences)
        measured = prompt_config(heads, cache.layers[0], model.dtype, [size])
        self._config = measured if is_own(measured) else WIDE_CONFIG if model.dtype == torch.float32 else CONFIG
        self._programs = -(-size // self._config["m"]) + PROMPTS
        wide = 3 * size + self.sequences + self.singles + size + BEFORE  # numbers of 64 bits
        narrow = 1 + 2 * (PROMPTS + 1) + 2 * self._programs  # of 32 bits
        self._numbers = torch.zeros(wide + -(-narrow // 2), dtype=torch.int64, device=device)
        lengths = [size, size, size, self.sequences, self.singles, size + BEFORE]
        parts = torch.split(self._numbers[:wide], lengths)
        self._ids, self._positions, self._slots, self._rows, self._contexts, self._context_slots = parts
        starts = self._numbers[wide:].view(torch.int32)[:narrow]
        parts = torch.split(starts, [1, PROMPTS + 1, PROMPTS + 1, 2 * self._programs])
        self._before, self._query_starts, self._context_starts, self._tiles = parts
        self._tables = torch.zeros(self.singles, max_blocks, dtype=torch.int32, device=device)
        alone = heads == model.config.num_kv_heads
        self._arrived = arrival_counters(self.singles * heads, device) if alone else None
        self.fill(Brought([], [], [], [], [], []), torch.zeros(0, 0, dtype=torch.int32), [])

    def fits(self, brought: Brought) -> bool:
        """Whether the step has room for these sequences."""
        singles = brought.singles
        prompts, before = len(brought.query_lens) - singles, sum(brought.context_lens[singles:])
        sequences = len(brought.query_lens) <= self.sequences and singles <= self.singles and prompts <= PROMPTS
        return sequences and len(brought.ids) <= self.size and before <= self.size + BEFORE

    def fill(self, brought: Brought, tables: torch.Tensor, context_slots: Sequence[int]) -> None:
        """Make it the step of these sequences.

        tables: int32 [singles, up to max_blocks] on the CPU, the blocks of those that bring one token. context_slots:
        where the contexts of the others lie in the cache, end to end.
        """
        size, count, singles = self.size, len(brought.ids), brought.singles
        queries, contexts = brought.query_lens[singles:], brought.context_lens[singles:]
        padding = [0] * (size - count)
        tiles = tiles_of(queries, contexts, self._config["m"])
        tiles += [(0, size)] * (self._programs - len(tiles))  # beyond the queries of any prompt
        wide = [
            *brought.ids, *padding, *brought.positions, *padding, *brought.slots, *[-1] * len(padding),
            *brought.last, *[0] * (self.sequences - len(brought.last)),
            *brought.context_lens[:singles], *[0] * (self.singles - singles),
            *context_slots, *[-1] * (size + BEFORE - len(context_slots)),
        ]  # fmt: skip
        more = PROMPTS - len(queries)
        query_starts, context_starts = list(accumulate(queries, initial=0)), list(accumulate(contexts, initial=0))
        narrow = [
            singles, *query_starts, *[query_starts[-1]] * more, *context_starts, *[context_starts[-1]] * more,
            *chain.from_iterable(tiles),
        ]  # fmt: skip
        halves = torch.tensor([*narrow, *[0] * (len(narrow) % 2)], dtype=torch.int32).view(torch.int64)
        self._numbers.copy_(to_device(torch.cat((tensor_of(wide), halves)), self._numbers.device))
        if singles:
            self._tables[:singles, : tables.shape[1]] = to_device(tables, self._tables.device)

    @torch.inference_mode()
    def run(self, ends: bool = False) -> None:
        """Compute the logits of the rows that are wanted; `ends` as `run_layers` takes it."""
        model, ids, stored = self.model, self._ids, self.cache.layers[0]
        ids = ids.where(ids >= 0, self._last[(-1 - ids).clamp_(min=0)])
        angles = model.rotary.angles(self._positions, [self.size], [1.0], math.inf, model.dtype)
        parts = contexts_in_parts(self._contexts, model.config.num_heads, stored, self._arrived)
        lens = [self.size]
        plan = RaggedPlan(
            self.singles, self._before, self._contexts, parts, self._tables, lens, lens, self._query_starts,
            self._context_starts, self._context_slots, self._config, self._tiles.view(-1, 2), padded=True,
        )  # fmt: skip
        hidden = run_layers(model, ids, self._slots, angles, plan, self.cache, self._rows, ends)
        model.logits(hidden, self._logits)


class MixedGraphs:
    """Replays a step with prompts in it, padded to one of SIZES, where that is done before it could be launched.

    Shares the memory and the buffer of logits of `graphs`, as none of them runs at the same time.
    """

    def __init__(
        self, model: Transformer, cache: KVCache, graphs: DecodeGraphs, max_rows: int, last: torch.Tensor
    ) -> None:
        self.model, self.cache, self._graphs, self._last = model, cache, graphs, last
        self._possible = [size for size in SIZES if size <= max_rows]
        self._recorded: dict[int, tuple[MixedStep, torch.cuda.CUDAGraph]] = {}  # by size, ascending once recorded
        self.seconds: dict[int, float] = {}  # that the device takes for each, without contexts
        self.costs = Costs(0.0, 0.0)

    def launch_each(self) -> None:
        """Launch the kernels that the steps take, so that they are compiled.

        Larger ones take no others but of attention, which `compile_prompts` launches.
        """
        few = [size for size in self._possible if size <= max(USUAL, *INT_MATMUL_ROWS.values())]
        for size in self._possible[: len(few) + 1]:
            self._step(size).run(ends=True)

    def record(self, costs: Costs) -> None:
        """Record the sizes that a host with these costs launches more slowly than the device runs them, or nearly so.

        What the device takes grows a little more slowly than the rows.
        """
        self.costs = costs
        usual = next((size for size in reversed(self._possible) if size <= USUAL), None)
        if usual is None or not self._record(usual):
            return
        most = 2 * costs.launching / self.seconds[usual] * usual
        for size in reversed(self._possible):  # the largest first: the memory that it takes serves the others too
            if size <= most:
                self._record(size)
        self._recorded = dict(sorted(self._recorded.items()))

    def take(self, rows: int, context: int) -> MixedStep | None:
        """The step for so many rows, if it is done sooner than one that is launched; else None.

        context: tokens that its sequences of one token have in the cache.
        """
        size = next((size for size in self._recorded if size >= rows), None)
        if size is None:
            return None
        reading = context * self.costs.context
        launched = max(self.costs.launching, self._expected(rows) + reading)
        return self._recorded[size][0] if self.seconds[size] + reading <= launched else None

    def replay(self, step: MixedStep) -> torch.Tensor:
        """float32 logits [sequences, vocab_size] of a filled step, the wanted ones first; valid until the next one."""
        self._recorded[step.size][1].replay()
        return self._graphs.logits

    def _expected(self, rows: int) -> float:
        """Seconds of the device for so many rows, between those of the sizes, or of none; rather fewer than more."""
        above = next(size for size in self._recorded if size >= rows)
        below = max((size for size in self._recorded if size < above), default=0)
        low = self.seconds.get(below, 0.0)
        return low + (self.seconds[above] - low) * (rows - below) / (above - below)

    def _step(self, size: int) -> MixedStep:
        graphs = self._graphs
        return MixedStep(self.model, self.cache, size, graphs.max_blocks, self._last, graphs.logits)

    def _needs(self, size: int) -> int:
        """Bytes that a step takes, no less: activations beside each other, a weight unpacked, and the head."""
        config, packed_head = self.model.config, getattr(self.model.lm_head, "packed", None)
        hidden, widest = config.hidden_size, 2 * config.intermediate_size
        unpacked = widest if packed_head is None else max(widest, config.vocab_size)
        return self.model.dtype.itemsize * (4 * size * (widest + 4 * hidden) + unpacked * hidden)

    def _record(self, size: int) -> bool:
        """Record one size, where it is not and there is memory for it; returns whether it is recorded."""
        if size in self._recorded:
            return True
        if torch.cuda.mem_get_info(self._last.device)[0] < 2 * self._needs(size):
            return False
        step = self._step(size)
        try:
            step.run(ends=True)  # loads what it takes; all rows are padding, so the cache is left alone
            graph, _ = self._graphs.capture(step.run)
        except torch.OutOfMemoryError:
            return False
        self._recorded[size] = step, graph
        self.seconds[size] = seconds(graph.replay, times=2)
        return True
