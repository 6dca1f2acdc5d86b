"""One answer on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwenfit.engine.output import Stats
from qwenfit.engine.params import SamplingParams
from qwenfit.engine.text import TextStream


@dataclass(slots=True, eq=False)
class Request:
    """One answer being made. The scheduler moves it between waiting and running; nothing else keeps it."""

    id: int
    index: int  # which of the n answers
    tokens: list[int]  # prompt, then answer
    prompt_length: int
    max_length: int  # prompt + answer end here at the latest
    params: SamplingParams
    seed: int
    alpha: float  # dynamic NTK, from the full prompt length; never changes, preempted or not
    stop_ids: frozenset[int]
    prefix_root: bytes  # where the chain of block hashes starts: it knows alpha and the salt
    text: TextStream | None  # None: no tokenizer, token ids only
    stats: Stats
    deadline: float | None = None  # on the engine's clock
    siblings: list[Request] = field(default_factory=list)  # the other n - 1, held until this one's prompt is cached

    # The scheduler's, set when it lets the request in. `computed` tokens have their keys and values in `blocks`; a step
    # adds `scheduled` more.
    running: bool = False
    ended: bool = False
    computed: int = 0
    scheduled: int = 0
    pending: int = 0  # tokens that are sampled but still on the device: they follow `tokens`
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    shared_blocks: int = 0  # the first of `blocks` that are known to the prefix cache
    # Once it was stopped: slots in the host's memory for its first blocks. The first `resident` of them are in `blocks`
    # too, those from `hosted` on are in the slots; one may be in both.
    slots: list[int] = field(default_factory=list)
    resident: int = 0
    hosted: int = 0
    row: int = -1  # of the tables that the runner and the sampler keep
    blocks_in_table: int = 0
    in_penalties: bool = False  # whether they keep its tokens

    # The sampler's: the numbers that eight tokens are drawn at, and which eight.
    uniforms: list[float] = field(default_factory=list)
    uniforms_from: int = -1

    _plain: bool = field(init=False)  # greedy, and neither bias nor penalties change the logits

    def __post_init__(self) -> None:
        self._plain = self.params.greedy and not (self.params.logit_bias or self.params.penalised)

    @property
    def length(self) -> int:
        """Tokens so far, pending ones included."""
        return len(self.tokens) + self.pending

    @property
    def num_generated(self) -> int:
        return self.length - self.prompt_length

    @property
    def takes_likeliest(self) -> bool:
        """Whether the next token is the likeliest by the logits as the network gives them; once so, always so."""
        return self._plain and not self.is_early

    @property
    def is_early(self) -> bool:
        """Whether the answer must not end yet."""
        return self.num_generated < self.params.min_tokens
