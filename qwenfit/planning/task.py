"""What is to be done: inference or finetuning, with every size that a plan needs. Validated where it is made."""

from __future__ import annotations

from dataclasses import dataclass

from qwenfit.errors import UsageError

FINETUNE_METHODS = ("full", "lora", "lora-emb", "qlora")
TASKS = ("inference", *FINETUNE_METHODS)
PRECISIONS = ("bf16", "fp16", "fp32", "int8", "int4")
KV_CACHES = ("bf16", "fp16", "fp32", "int8")
OPTIMIZERS = ("fp32", "bf16", "8bit")
LARGEST = 10**9  # any token or batch count above this is a typing error


def check_count(name: str, value: int, least: int = 1) -> int:
    """`value` if it is a whole number in [least, 1e9]; UsageError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{name} must be a whole number, not {value!r}.")
    if value < least:
        raise UsageError(f"{name} must be at least {least}, not {value}.")
    if value > LARGEST:
        raise UsageError(f"{name} = {value} is beyond anything a model could use.")
    return value


def check_choice(name: str, value: str, known: tuple[str, ...]) -> str:
    """`value` if it is one of `known`; UsageError naming them otherwise."""
    if value not in known:
        raise UsageError(f"{name} must be one of {', '.join(known)}, not {value!r}.")
    return value


@dataclass(frozen=True)
class Inference:
    """`batch` requests at once, each a prompt of `prompt` tokens and an answer of `generate` tokens.

    `shared_prefix` tokens at the start of the prompts are the same for all requests. `flash_attention` None means:
    wherever the card and the stack have it.
    """

    prompt: int = 1
    generate: int = 2048
    batch: int = 1
    shared_prefix: int = 0
    kv_cache: str = "bf16"
    head_precision: str | None = None  # "int8" | "int4": quantize the head too; None: as the embedding
    flash_attention: bool | None = None

    name = "inference"

    def __post_init__(self) -> None:
        check_count("prompt", self.prompt)
        check_count("generate", self.generate)
        check_count("batch", self.batch)
        check_count("shared_prefix", self.shared_prefix, least=0)
        check_choice("kv_cache", self.kv_cache, KV_CACHES)
        if self.head_precision is not None:
            check_choice("head_precision", self.head_precision, ("int8", "int4"))
        if self.shared_prefix > self.prompt:
            raise UsageError(f"shared_prefix ({self.shared_prefix}) is longer than the prompt ({self.prompt}).")

    @property
    def context(self) -> int:
        """Tokens of one request when it ends."""
        return self.prompt + self.generate


@dataclass(frozen=True)
class Finetune:
    """One optimizer step is `grad_accum` micro-batches of `micro_batch` padded samples of `seq_len` tokens per GPU.

    `optimizer`: "fp32" keeps float32 master weights, gradients and both Adam moments (qwenfit: the moments in bf16);
    "bf16" keeps all in bf16; "8bit" keeps the moments in 8 bits. `fused_loss` None means: what the stack does.
    `zero` is 0, 2 or 3.
    """

    method: str = "lora"
    seq_len: int = 1024
    micro_batch: int = 1
    grad_accum: int = 8
    lora_rank: int = 64
    optimizer: str = "fp32"
    checkpointing: bool = True
    fused_loss: bool | None = None
    zero: int | None = None  # None: what the official scripts use for the method and the number of GPUs

    def __post_init__(self) -> None:
        check_choice("task", self.method, FINETUNE_METHODS)
        check_count("seq_len", self.seq_len)
        check_count("micro_batch", self.micro_batch)
        check_count("micro_batch x seq_len", self.tokens)
        check_count("grad_accum", self.grad_accum)
        check_count("lora_rank", self.lora_rank)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        if self.zero not in (None, 0, 2, 3):
            raise UsageError(f"zero must be 0, 2 or 3, not {self.zero!r}.")

    @property
    def name(self) -> str:
        return self.method

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.micro_batch * self.seq_len


Task = Inference | Finetune
