"""TuneConfig: every setting of a finetuning run, from YAML or flags, validated before anything is read.

Imports neither torch nor a YAML reader until one is needed.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qwenfit.errors import NotFound, UsageError, missing_extra, nearest
from qwenfit.planning.task import FINETUNE_METHODS, OPTIMIZERS, check_choice, check_count

PRECISIONS = ("bf16", "fp32", "int8", "int4")
MASKS = ("assistant_only", "qwen1", "all")
KEEPS = ("inputs", "attention", "all")
SCHEDULES = ("cosine", "constant")
MOMENTS = ("bf16", "fp32")
FORMATS = ("conversations", "messages", "sharegpt", "alpaca", "text")
ON_LONG = ("truncate", "drop", "error")
MAX_YAML_BYTES = 1 << 20

# Settings that may differ when a run is resumed: they change neither the numbers nor their order.
FREE_ON_RESUME = {
    *("output", "resume", "save_every", "keep_last", "log_every", "max_bad_steps", "tensorboard", "wandb", "force"),
}


@dataclass(frozen=True)
class TuneConfig:
    """One finetuning run. Defaults are the official script's for LoRA where it has one.

    Raises UsageError, naming the setting, for a value that cannot be.
    """

    model: str
    data: tuple[str, ...] = ()  # files; "FILE@2.5" gives one a weight
    output: str = "tuned"  # the run's folder: checkpoints, metrics, the result
    eval_data: tuple[str, ...] = ()
    eval_share: float = 0.0  # of the rows in `data`, kept for evaluation where there is no eval_data
    format: str | None = None  # of the data's rows; None: as each file looks
    on_long: str = "truncate"  # what a conversation longer than seq_len meets
    skip_bad: bool = False  # leave bad rows out and count them, instead of stopping at the first

    method: str | None = None  # full, lora, lora-emb, qlora; None: lora, or lora-emb where a base model needs it
    precision: str | None = None  # of the frozen weights; None: the checkpoint's. float32 computes in float32
    lora_rank: int = 64  # higher: more to learn with, 12 bytes more per parameter
    lora_alpha: float = 16.0  # the adapter counts alpha / rank
    lora_dropout: float = 0.05
    new_tokens: bool = False  # train only ChatML's rows of embedding and head, not the whole tables

    mask: str = "assistant_only"  # which tokens are trained: qwen1 is exactly the official script's
    seq_len: int = 1024  # longer samples are cut; higher: more activation memory
    pack: bool = False  # several samples in a row, without attention between them
    pad: bool = True  # rows are seq_len wide, as the guide measured; else as wide as a micro-batch's longest
    micro_batch: int = 1  # rows at once; higher: faster on large GPUs, more activation memory
    grad_accum: int = 8  # micro-batches per optimizer step

    epochs: float = 3.0
    max_steps: int | None = None  # optimizer steps; None: as epochs say
    lr: float | None = None  # None: 3e-4 for adapters, 1e-5 for full
    schedule: str = "cosine"
    warmup: float = 0.01  # share of the steps
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0  # largest norm of the gradients; 0: never clip
    optimizer: str = "fp32"  # float32 master weights; bf16: least memory; 8bit: moments in 8 bits
    moments: str = "bf16"  # of AdamW; fp32: 4 bytes more per trained parameter

    zero: int | None = None  # over several processes: 2 or 3 shards, 0 copies; None: full 3, adapters 2, qlora 0
    deepspeed: bool = False  # shard by DeepSpeed, with the official script's settings, not by torch's fully_shard
    keep: str = "inputs"  # for the backward pass: inputs, attention or all; more memory, less time
    offload: bool = False  # what is kept waits in host memory (CUDA)

    eval_every: int = 0  # steps; 0: at the end of each epoch where there is eval_data
    patience: int = 0  # stop after so many evaluations without improvement; 0: never
    save_every: int = 100  # steps
    keep_last: int = 2  # checkpoints
    log_every: int = 1  # steps between lines where there is no terminal
    max_bad_steps: int = 3  # steps in a row with a loss that is no number, before the run stops
    resume: bool = False  # go on from the newest checkpoint that verifies
    seed: int = 0
    device: str | None = None  # cpu or cuda
    force: bool = False  # run although the plan says that it does not fit
    tensorboard: bool = False
    wandb: str | None = None  # project

    def __post_init__(self) -> None:
        for name in ("data", "eval_data"):
            value = getattr(self, name)
            if isinstance(value, str | list):
                object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        _check_types(self)
        self._check_choices()
        if not self.output:
            raise UsageError("The run's folder has no name.", "--output FOLDER")
        check_count("seq_len", self.seq_len, least=2)
        for name in ("micro_batch", "grad_accum", "lora_rank", "save_every", "keep_last", "log_every", "max_bad_steps"):
            check_count(name, getattr(self, name))
        for name in ("eval_every", "patience", "seed"):
            check_count(name, getattr(self, name), least=0)
        if self.max_steps is not None:
            check_count("max_steps", self.max_steps)
        if self.zero not in (None, 0, 2, 3):
            raise UsageError(f"zero must be 0, 2 or 3, not {self.zero!r}.")
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise UsageError(f"{name} must be between {low:g} and {high:g}, not {value!r}.")
        if self.patience and not (self.eval_data or self.eval_share):
            raise UsageError(
                "patience waits for evaluations, and there is nothing to evaluate with.",
                "--eval-data FILE or --eval-share 0.05",
            )
        if self.eval_share and self.eval_data:
            raise UsageError("There is evaluation data, so no share of the training data is needed for it.")
        if self.new_tokens and self.method in ("full", "lora-emb"):
            raise UsageError(f"{self.method} trains every row of the embedding already.", "Leave --new-tokens out.")

    def _check_choices(self) -> None:
        if self.method is not None:
            check_choice("method", self.method, FINETUNE_METHODS)
        if self.format is not None:
            check_choice("format", self.format, FORMATS)
        if self.precision is not None:
            check_choice("precision", self.precision, PRECISIONS)
        for name, known in (
            ("mask", MASKS),
            ("on_long", ON_LONG),
            ("keep", KEEPS),
            ("schedule", SCHEDULES),
            ("optimizer", OPTIMIZERS),
            ("moments", MOMENTS),
        ):
            check_choice(name, getattr(self, name), known)

    @property
    def learning_rate(self) -> float:
        if self.lr is not None:
            return self.lr
        return 1e-5 if self.method == "full" else 3e-4

    def fingerprint(self) -> dict[str, Any]:
        """The settings that a resumed run must share."""
        return {name: value for name, value in self.to_dict().items() if name not in FREE_ON_RESUME}

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


_RANGES = (
    ("eval_share", 0.0, 0.9),
    ("lora_alpha", 1e-6, 1e6),
    ("lora_dropout", 0.0, 0.99),
    ("epochs", 1e-6, 1e6),
    ("lr", 0.0, 10.0),
    ("warmup", 0.0, 1.0),
    ("weight_decay", 0.0, 10.0),
    ("beta1", 0.0, 0.9999),
    ("beta2", 0.0, 0.99999),
    ("eps", 1e-16, 1.0),
    ("clip", 0.0, 1e6),
)


def make_config(flags: dict[str, Any], file: Path | None = None) -> TuneConfig:
    """Settings from a YAML file, then from flags that are not None; flags win. Raises UsageError and NotFound."""
    table = read_yaml(file) if file is not None else {}
    table |= {name: value for name, value in flags.items() if value is not None and value != ()}
    known = [f.name for f in fields(TuneConfig)]
    for name in table:
        if name not in known:
            raise UsageError(f"There is no setting {name!r}.", f"Did you mean {', '.join(nearest(name, known))}?")
    if "model" not in table:
        raise UsageError("No model is named.", "qwenfit tune MODEL --data FILE")
    return TuneConfig(**table)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping of settings (`-` and `_` alike). Raises NotFound and UsageError."""
    try:
        import yaml  # type: ignore[import-untyped, unused-ignore]
    except ImportError as error:
        raise missing_extra("PyYAML", "tune") from error
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_YAML_BYTES + 1)
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}.") from error
    if len(raw) > MAX_YAML_BYTES:
        raise UsageError(f"{path} has more than {MAX_YAML_BYTES:,} bytes: it is no settings file.")
    try:
        table = yaml.load(raw, _numbers_as_meant(yaml))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark is not None else ""
        raise UsageError(f"{path} is no YAML{where}: {reason[:160]}.") from error
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise UsageError(f"{path} must be a mapping of settings, such as `model: Qwen2.5-0.5B`.")
    names = [key.replace("-", "_") for key in table]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(f"{path} has the setting {twice} twice.")
    return dict(zip(names, table.values(), strict=True))


def _numbers_as_meant(yaml: Any) -> Any:
    """The safe loader, without aliases (a small file can grow beyond any memory with them) and without a key twice.

    It reads 1e-4 as a number, which YAML 1.1 takes for text since it has no point.
    """
    import re

    class Loader(yaml.SafeLoader):  # type: ignore[misc, unused-ignore]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases are not used in settings")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            table = super().construct_mapping(node, deep)
            if len(table) < len(node.value):
                raise yaml.YAMLError("a key is there twice")
            return table

    number = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader


def _check_types(config: TuneConfig) -> None:
    """Values from YAML are of the kind that their setting is; whole numbers do for floats."""
    for f in fields(config):
        value, kind = getattr(config, f.name), str(f.type)
        if value is None and "None" in kind:
            continue
        good = {
            "str": isinstance(value, str),
            "int": isinstance(value, int) and not isinstance(value, bool),
            "float": isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value),
            "bool": isinstance(value, bool),
            "tuple[str, ...]": isinstance(value, tuple) and all(isinstance(v, str) for v in value),
        }[kind.removesuffix(" | None")]
        if not good:
            raise UsageError(f"{f.name} must be {_KINDS[kind.removesuffix(' | None')]}, not {value!r}.")


_KINDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "tuple[str, ...]": "a list of file names",
}
