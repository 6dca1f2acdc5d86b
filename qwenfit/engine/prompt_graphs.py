"""CUDA graphs of a whole prompt that comes alone: the device is done with it before a host has launched its kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from qwenfit.engine.copies import tensor_of, to_device
from qwenfit.engine.graphs import DecodeGraphs
from qwenfit.kernels.choice import INT_MATMUL_ROWS
from qwenfit.kernels.triton.prompt_attention import tiles_of
from qwenfit.kernels.triton.ragged import RaggedPlan, is_own, prompt_config
from qwenfit.model.kv_cache import KVCache
from qwenfit.model.prefill import run_layers
from qwenfit.model.transformer import Transformer

LENGTHS = (64, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, *range(1152, 2049, 128))
PADDED = 1024  # beyond, the device takes longer than the host, and a graph must not pad by more than a 32nd


class PromptStep:
    """The step of one prompt of at most `size` tokens, on buffers that stay in place; rows after it are padding."""

    def __init__(self, model: Transformer, cache: KVCache, size: int, device: torch.device) -> None:
        self.model, self.cache, self.size = model, cache, size
        # Token ids, slots, the last token's row, and where prompts start.
        self._numbers = torch.zeros(2 * size + 2, dtype=torch.int64, device=device)
        starts = self._numbers[-1:].view(torch.int32)  # 0 and the length: the halves of length * 2^32
        none = torch.empty(0, dtype=torch.int64, device=device)
        config = prompt_config(model.config.num_heads, cache.layers[0], model.dtype, [size])
        tiles = torch.tensor(tiles_of([size], [size], config["m"]), device=device).int() if is_own(config) else None
        self._plan = RaggedPlan(
            0, starts[:1], none, None, none, [size], [size], starts, starts, None, config, tiles, padded=True
        )
        positions = torch.arange(size, device=device)
        self._angles = model.rotary.angles(positions, [size], [1.0], math.inf, model.dtype)

    def fill(self, ids: Sequence[int], slots: Sequence[int]) -> None:
        """A prompt's token ids, and where in the cache their keys and values go."""
        count, padding = len(ids), self.size - len(ids)
        numbers = [*ids, *[0] * padding, *slots, *[-1] * padding, count - 1, count << 32]
        self._numbers.copy_(to_device(tensor_of(numbers), self._numbers.device))

    @torch.inference_mode()
    def run(self, ends: bool = False) -> torch.Tensor:
        """float32 logits [1, vocab_size] after the last token; `ends` as `run_layers` takes it."""
        size, numbers = self.size, self._numbers
        last = numbers[2 * size : 2 * size + 1]
        hidden = run_layers(
            self.model, numbers[:size], numbers[size : 2 * size], self._angles, self._plan, self.cache, last, ends
        )  # fmt: skip
        return self.model.logits(hidden)


class PromptGraphs:
    """Records a prompt's step, padded to one of LENGTHS, when such a length comes for the second time.

    The first time it is run as it is, which compiles and loads what it takes. `graphs`: whose memory these take too, as
    none of them runs at the same time.
    """

    def __init__(self, model: Transformer, cache: KVCache, graphs: DecodeGraphs, device: torch.device) -> None:
        self.model, self.cache, self.device = model, cache, device
        self._graphs = graphs
        self._steps: dict[int, PromptStep] = {}
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def launch_each(self) -> None:
        """Launch every kernel that a lone prompt takes, so that they are compiled.

        Longer ones take no others but of attention, which `compile_prompts` launches.
        """
        for size in (size for size in LENGTHS if size <= max(INT_MATMUL_ROWS.values())):
            PromptStep(self.model, self.cache, size, self.device).run(ends=True)

    @staticmethod
    def size_for(length: int) -> int | None:
        """What a prompt of so many tokens is padded to; None: it is not for a graph."""
        size = next((size for size in LENGTHS if size >= length), None)
        return size if size is not None and (size <= PADDED or size - length <= size // 32) else None

    def run(self, size: int, ids: Sequence[int], slots: Sequence[int]) -> torch.Tensor:
        """float32 logits [1, vocab_size] after a prompt that no NTK alpha stretches, valid until the next step."""
        step = self._steps.get(size)
        if step is None:
            step = self._steps[size] = PromptStep(self.model, self.cache, size, self.device)
            step.fill(ids, slots)
            return step.run()
        step.fill(ids, slots)
        if size not in self._recorded:
            self._recorded[size] = graph, logits = self._record(step)
            graph.replay()
            return logits
        graph, logits = self._recorded[size]
        graph.replay()
        return logits

    def _record(self, step: PromptStep) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        return self._graphs.capture(step.run)
