"""LLM: a model, a tokenizer and an engine behind `generate` and `chat`."""

from __future__ import annotations

import gc
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import torch

from qwenfit.config import ModelConfig
from qwenfit.engine.engine import Engine, check_whole
from qwenfit.engine.output import Delta, RequestOutput, collect
from qwenfit.engine.params import SamplingParams
from qwenfit.engine.runner import Network
from qwenfit.engine.sizes import free_bytes, free_host_bytes, num_blocks_for
from qwenfit.errors import DoesNotFit, UsageError, nearest
from qwenfit.model.kv_cache import KVCache

if TYPE_CHECKING:
    from qwenfit.checkpoint.tokenizer import Tokenizer

KV_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


class Sizes(TypedDict, total=False):
    """How much runs at once; what is left out takes the default in `LLM.from_parts`."""

    kv_cache: str
    max_model_len: int | None
    max_num_seqs: int
    max_batched_tokens: int
    max_queue: int | None
    num_blocks: int | None
    kv_bytes: int | None
    block_size: int
    prefix_cache: bool
    swap_bytes: int | None


class LLM:
    """`LLM("path or name").generate(["text" or [token ids]], SamplingParams(max_tokens=64))`.

    One thread at a time; several streams may be read in turn. `default_params` is what `generate` and `chat` start
    from where they are given nothing: what the model's authors recommend (generation_config.json, or a GGUF's own).
    """

    def __init__(
        self,
        model: str | ModelConfig,
        *,
        precision: str | None = None,
        head_precision: str | None = None,
        adapter: str | None = None,
        device: str | None = None,
        random_weights: bool = False,
        seed: int = 0,
        progress: Callable[[int, int], None] | None = None,
        **sizes: Unpack[Sizes],
    ) -> None:
        """Load a catalog name, a folder, a .gguf or a Hub id; `load_model` says what each option does.

        precision: "bf16", "fp16", "fp32", "int8" or "int4" (default: as stored); device: "cpu", "cuda", ... (default:
        a GPU if there is one); adapter: a LoRA folder in PEFT's format, merged into plain weights and run beside int8
        and int4 ones; `random_weights` (from `seed`): measure a model without downloading it, token ids only.
        The KV cache has the type of the activations unless `kv_cache` names another. `swap_bytes` of the host's memory
        (default: a quarter of what is free beside a GPU, else none) are taken, as they are needed, by what requests
        have computed that must wait for others.
        """
        from qwenfit.checkpoint.generation import published_sampling
        from qwenfit.checkpoint.load import load_model, with_files
        from qwenfit.checkpoint.resolve import resolve_model
        from qwenfit.checkpoint.tokenizer import load_tokenizer

        tokenizer, sampling = None, SamplingParams()
        if not random_weights:  # what is wrong with the vocabulary is told before gigabytes are read
            model = with_files(resolve_model(model), str(model))
            tokenizer, sampling = load_tokenizer(model.source, model), published_sampling(model.source)
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        # Pieces of any size out of one range of addresses: what loading leaves behind is of use again, or given back.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        network, config = load_model(
            model,
            precision=precision,
            head_precision=head_precision,
            device=device,
            random_weights=random_weights,
            seed=seed,
            progress=progress,
        )
        if adapter is not None:
            from qwenfit.tune.peft_format import load_adapter

            load_adapter(network, config, adapter)
        sizes.setdefault("kv_cache", KV_NAMES[network.dtype])
        self._set_up(network, config, tokenizer, device, **sizes)
        self.default_params = sampling

    @classmethod
    def from_parts(
        cls,
        model: Network,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        *,
        device: str = "cpu",
        **sizes: Unpack[Sizes],
    ) -> LLM:
        """An LLM of a ready network and tokenizer (None: token ids only)."""
        llm = cls.__new__(cls)
        llm._set_up(model, config, tokenizer, device, **sizes)
        return llm

    def _set_up(
        self,
        model: Network,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        device: str,
        *,
        kv_cache: str = "bf16",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_batched_tokens: int = 2048,
        max_queue: int | None = None,
        num_blocks: int | None = None,
        kv_bytes: int | None = None,
        block_size: int = 16,
        prefix_cache: bool = True,
        swap_bytes: int | None = None,
    ) -> None:
        check_whole(
            max_model_len=max_model_len, max_num_seqs=max_num_seqs, num_blocks=num_blocks, kv_bytes=kv_bytes,
            block_size=block_size,
        )  # fmt: skip
        self.config, self.tokenizer, self.device = config, tokenizer, device
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
        self.default_params = SamplingParams()
        if num_blocks is None:
            budget = free_bytes(device) if kv_bytes is None else kv_bytes
            tokens = max_num_seqs * (max_model_len or config.context_length)
            num_blocks = num_blocks_for(config, kv_cache, block_size, budget, tokens)
        if max_model_len is not None and max_model_len > num_blocks * block_size:
            raise DoesNotFit(
                f"A context of {max_model_len} tokens does not fit in a KV cache of {num_blocks * block_size} tokens.",
                f"Give --context {num_blocks * block_size}, or --kv-cache int8.",
            )
        self.engine = Engine(
            model,
            config,
            KVCache(config, num_blocks, block_size, kv_cache, device),
            tokenizer,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_batched_tokens=max_batched_tokens,
            max_queue=max_queue,
            prefix_cache=prefix_cache,
            swap_bytes=free_host_bytes(device) if swap_bytes is None else swap_bytes,
            device=device,
        )
        self._inboxes: dict[int, deque[Delta]] = {}  # request id -> where the call that waits for it reads
        if torch.device(device).type == "cuda":
            # What is there now (torch and Triton: 200,000 objects) is left out of later garbage collections, each of
            # which would let the device wait for 0.1 to 0.3 s. Nothing of an engine needs one: see its test. What
            # others tied to an earlier engine is let go here.
            gc.unfreeze()
            gc.collect()
            gc.freeze()

    @property
    def max_model_len(self) -> int:
        """The longest prompt and answer together, in tokens."""
        return self.engine.max_model_len

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[False] = False,
        deadline: float | None = None,
        cache_salt: str = "",
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: Literal[True],
        deadline: float | None = None,
        cache_salt: str = "",
    ) -> Iterator[Delta]: ...

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stream: bool = False,
        deadline: float | None = None,
        cache_salt: str = "",
    ) -> list[RequestOutput] | Iterator[Delta]:
        """Continue texts or token ids: all at once, with one SamplingParams for all or one each.

        `deadline` is in seconds from now, for each. With `stream` the deltas come as they are made; their
        `request_id` is the prompt's position in the list. Closing the iterator ends what is left. Raises UsageError
        and DoesNotFit before anything runs.
        """
        ids = self._encode_all(prompts)
        each = self._params_for(params, len(ids))
        for prompt, wanted in zip(ids, each, strict=True):
            self.engine.check(prompt, wanted)
        deltas = self._run(ids, each, deadline, cache_salt)
        return deltas if stream else collect(ids, each, deltas)

    @overload
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        template: Mapping[str, Any] | None = None,
        deadline: float | None = None,
        cache_salt: str = "",
        **sampling: Any,
    ) -> RequestOutput: ...

    @overload
    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        template: Mapping[str, Any] | None = None,
        deadline: float | None = None,
        cache_salt: str = "",
        **sampling: Any,
    ) -> Iterator[Delta]: ...

    def chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        stream: bool = False,
        template: Mapping[str, Any] | None = None,
        deadline: float | None = None,
        cache_salt: str = "",
        **sampling: Any,
    ) -> RequestOutput | Iterator[Delta]:
        """Answer a conversation, `[{"role": "user", "content": "..."}]`.

        `sampling` are fields of SamplingParams that replace those of `params`; `template` holds what the chat template
        takes besides the messages (`tools`, `enable_thinking`, ...).
        """
        if self.tokenizer is None:
            raise UsageError("A chat needs a tokenizer, and this model was loaded without one.")
        known = [field.name for field in fields(SamplingParams)]
        for name in sampling.keys() - set(known):
            raise UsageError(f"There is no sampling parameter {name!r}.", f"Did you mean {nearest(name, known)}?")
        wanted = replace(params or self.default_params, **sampling)
        prompt = self.tokenizer.apply_chat_template(messages, **(template or {}))
        if stream:
            return self.generate([prompt], wanted, stream=True, deadline=deadline, cache_salt=cache_salt)
        return self.generate([prompt], wanted, deadline=deadline, cache_salt=cache_salt)[0]

    def _encode_all(self, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
        alone = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int))
        return [self._encode(prompt) for prompt in ([prompts] if alone else prompts)]  # type: ignore[arg-type]

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise UsageError("A text prompt needs a tokenizer, and this model was loaded without one.")
        return self.tokenizer.encode(prompt)

    def _params_for(
        self, params: SamplingParams | Sequence[SamplingParams] | None, count: int
    ) -> Sequence[SamplingParams]:
        if params is None or isinstance(params, SamplingParams):
            return [params or self.default_params] * count
        if len(params) != count:
            raise UsageError(f"{count} prompts and {len(params)} SamplingParams were given; give one, or one each.")
        return params

    def _run(
        self, prompts: list[list[int]], params: Sequence[SamplingParams], deadline: float | None, cache_salt: str
    ) -> Iterator[Delta]:
        """Add the requests and step until all their answers have ended; what is left ends with the iterator.

        Those that may get the longest answers come first: at the end few requests are left to share a step's reading
        of the weights, and short ones leave it soonest.
        """
        position: dict[int, int] = {}
        inbox: deque[Delta] = deque()

        def longest_answer(i: int) -> int:
            most = params[i].max_tokens
            return self.max_model_len - len(prompts[i]) if most is None else most

        interrupts = self.engine.interrupts
        with interrupts.taken():
            try:
                for i in sorted(range(len(prompts)), key=longest_answer, reverse=True):
                    with interrupts.held():
                        request_id = self.engine.add(prompts[i], params[i], deadline=deadline, cache_salt=cache_salt)
                        position[request_id] = i
                        self._inboxes[request_id] = inbox
                unfinished = sum(wanted.n for wanted in params)
                while unfinished:
                    while not inbox:
                        self._step()
                    delta = inbox.popleft()
                    unfinished -= delta.finish_reason is not None
                    delta.request_id = position[delta.request_id]
                    yield delta
            finally:
                with interrupts.held():
                    self.engine.abort(*position)
                    for request_id in position:
                        del self._inboxes[request_id]

    def _step(self) -> None:
        with self.engine.interrupts.held():
            for delta in self.engine.step():
                inbox = self._inboxes.get(delta.request_id)
                if inbox is not None:
                    inbox.append(delta)
