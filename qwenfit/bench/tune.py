"""One cell of the guide's finetuning table: planned, run with random weights by the trainer's own loop, and compared.

The data are random tokens that fill every row and are all trained: time and memory do not depend on what they say,
and the loss cannot take less than all of them.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from qwenfit.bench.memory import process_bytes
from qwenfit.bench.record import Figure, Record, make_record
from qwenfit.catalog import read_csv
from qwenfit.config import ModelConfig
from qwenfit.errors import BeyondTolerance
from qwenfit.model.linear import Linear
from qwenfit.model.transformer import Transformer
from qwenfit.planning.finetune_speed import training_flops
from qwenfit.planning.task import Finetune
from qwenfit.planning.types import Plan
from qwenfit.quantize.rtn import quantize_rtn
from qwenfit.tune.adapters import LINEARS, LoRA, add_lora, freeze, train_tables, trained_parameters
from qwenfit.tune.batch import TrainBatch
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.loop import train_step
from qwenfit.tune.offload import park_embedding
from qwenfit.tune.optimizer import AdamW
from qwenfit.tune.planned import plan_tune
from qwenfit.tune.world import World

TOLERANCE = {"allocated": 0.03, "seconds_per_iter": 0.12}  # what a GPU's plan is held to
GUIDE_METHODS = {"full": "Full-parameter", "lora": "LoRA", "lora-emb": "LoRA (emb)", "qlora": "Q-LoRA"}


@dataclass
class Trainee:
    """A network ready to train, its optimizer, and what it was made for; cells that differ in length share it."""

    key: tuple[Any, ...]
    config: ModelConfig
    model: Transformer
    optimizer: AdamW
    world: World

    def release(self) -> None:
        """Let go of what is large, whoever still holds this."""
        del self.model, self.optimizer
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Measured:
    """Seconds of each iteration after the first, the loss of every one, and peaks in bytes (on a CPU the process)."""

    seconds: list[float]
    losses: list[float]
    allocated: int
    reserved: int
    process: int


def bench_cell(
    settings: TuneConfig, steps: int = 3, trainee: Trainee | None = None, matmul: float | None = None
) -> tuple[Record, Trainee]:
    """Plan and run `settings`, its `device` given; `trainee`: of the cell before, used again if it is the same.

    matmul: FLOP/s that a large product reaches here. Raises DoesNotFit before anything is loaded.
    """
    if trainee is not None and trainee.key != key_of(settings):
        trainee.release()  # before the plan asks what is free
    made = plan_tune(settings)
    device = "cpu" if made.hardware.device.kind == "cpu" else "cuda"
    trainee = make_trainee(settings, made.model, made.precision, device, trainee)
    matmul = matmul_rate(device, made.precision) if matmul is None else matmul
    return _record(made, settings, measure(trainee, settings, steps), matmul), trainee


def key_of(settings: TuneConfig) -> tuple[Any, ...]:
    """The settings that a trainee is made from."""
    s = settings
    return (s.model, s.method, s.precision, s.optimizer, s.moments, s.lora_rank, s.lora_alpha, s.lora_dropout, s.seed)


def make_trainee(
    settings: TuneConfig, config: ModelConfig, precision: str, device: str, before: Trainee | None = None
) -> Trainee:
    """A network of `config` with random weights, adapted as `settings` say; or `before`, if it is the same."""
    if before is not None and before.key == key_of(settings):
        return before
    torch.manual_seed(settings.seed)
    model = random_network(config, precision, device)
    if settings.method == "full":
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    else:
        freeze(model)
        narrow = settings.optimizer == "bf16" and precision != "fp32"
        lora = LoRA(settings.lora_rank, settings.lora_alpha, settings.lora_dropout)
        add_lora(model, lora, torch.bfloat16 if narrow else torch.float32)
        if settings.method == "lora-emb":
            train_tables(model)
        park_embedding(model)
    moments = torch.bfloat16 if settings.moments == "bf16" else torch.float32
    optimizer = AdamW(trained_parameters(model), settings.optimizer, moments=moments, seed=settings.seed)
    return Trainee(key_of(settings), config, model.train(), optimizer, World(device))


def random_network(config: ModelConfig, precision: str, device: str) -> Transformer:
    """Weights drawn on `device` with a standard deviation of 1 / sqrt(inputs); int4 and int8 ones in groups of 128."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = Transformer(config, dtype, "meta")
    for name, parameter in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        drawn = torch.randn(parameter.shape, dtype=dtype, device=device)
        values = drawn.mul_(parameter.shape[-1] ** -0.5) if parameter.dim() == 2 else drawn.mul_(0.02)
        if "norm" in path:
            values.add_(1)
        if precision in ("int4", "int8") and path.endswith(LINEARS) and leaf == "weight":
            packed = Linear.from_quantized(quantize_rtn(values, int(precision[3:])), None, dtype, device)
            assert isinstance(owner, Linear)
            packed.bias = owner.bias
            model.set_submodule(path, packed)
        else:
            setattr(owner, leaf, nn.Parameter(values, requires_grad=False))
    return model


def measure(trainee: Trainee, settings: TuneConfig, steps: int) -> Measured:
    """One iteration to warm up, then `steps` timed ones, by the trainer's own `train_step`."""
    cuda = trainee.world.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator().manual_seed(settings.seed)
    seconds, losses = [], []
    for _ in range(1 + steps):
        batches = [_random_batch(trainee.config.vocab_size, settings, generator) for _ in range(settings.grad_accum)]
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        row, _ = train_step(trainee.model, trainee.optimizer, batches, settings, settings.learning_rate, trainee.world)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        losses.append(row["loss"])
    process = process_bytes(str(trainee.world.device))
    allocated = reserved = process
    if cuda:
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return Measured(seconds[1:], losses, allocated, reserved, process)


def _random_batch(vocab_size: int, settings: TuneConfig, generator: torch.Generator) -> TrainBatch:
    shape = (settings.micro_batch, settings.seq_len)
    ids = torch.randint(0, vocab_size, shape, generator=generator)
    return TrainBatch(ids, ids.clone(), torch.arange(shape[1]).repeat(shape[0], 1), None, ["random"] * shape[0])


def matmul_rate(device: str, precision: str | None = None) -> float:
    """FLOP/s of a large product in the type that training computes in, here and now: the best of 5."""
    n = 8192 if device == "cuda" else 1024
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def _record(made: Plan, settings: TuneConfig, measured: Measured, matmul: float) -> Record:
    task, memory, speed = made.task, made.memory, made.speed
    assert isinstance(task, Finetune)
    seconds = statistics.median(measured.seconds)
    flops = task.grad_accum * training_flops(made.model, task) / seconds
    # A CPU has no counter of what its allocator gave out: there all three are the process.
    cpu = made.hardware.device.kind == "cpu"
    allocated, reserved = (memory.process,) * 2 if cpu else (memory.allocated, memory.reserved)
    figures = [
        Figure("seconds_per_iter", "s", speed.seconds_per_iter, seconds),
        Figure("tokens_per_s", "tokens/s", speed.tokens_per_s, task.grad_accum * task.tokens / seconds),
        Figure("allocated", "GB", allocated / 1e9, measured.allocated / 1e9),
        Figure("reserved", "GB", reserved / 1e9, measured.reserved / 1e9),
        Figure("process", "GB", memory.process / 1e9, measured.process / 1e9),
        Figure("flops", "TFLOP/s", None, flops / 1e12),
        Figure("product_share", "of a large product's speed", None, flops / matmul),
    ]
    facts = {
        "cell": {"method": task.method, "seq_len": task.seq_len, "micro_batch": task.micro_batch,
                 "grad_accum": task.grad_accum, "optimizer": task.optimizer, "keep": settings.keep},
        "seconds": measured.seconds,
        "losses": measured.losses,
        "matmul_flops": matmul,
        "guide": guide_figures(made.model.name, task),
        "peers": peer_figures(made.model.name, task),
        "device": "cpu" if cpu else "cuda",
    }  # fmt: skip
    return make_record("tune", made, figures, facts)


def guide_figures(model: str, task: Finetune) -> dict[str, float] | None:
    """The guide's own measurement of the cell, on one A100; None where it has none."""
    if (task.micro_batch, task.grad_accum) != (1, 8):
        return None
    for row in read_csv("guide/finetune.csv"):
        cell = (row["model"], row["method"], int(row["gpus"]), int(row["seq_len"]))
        if cell == (model, GUIDE_METHODS[task.method], 1, task.seq_len):
            return {"s_per_iter": float(row["s_per_iter"]), "memory_gb": float(row["memory_gb"])}
    return None


def peer_figures(model: str, task: Finetune) -> list[dict[str, Any]]:
    """Other software's measurements of the cell, on one H100."""
    if (task.micro_batch, task.grad_accum) != (1, 8):
        return []
    return [
        {"software": row["software"], "s_per_iter": float(row["s_per_iter"]), "memory_gb": float(row["memory_gb"])}
        for row in read_csv("peers_finetune.csv")
        if (row["model"], row["method"], int(row["seq_len"])) == (model, task.method, task.seq_len)
    ]


def with_defaults(settings: TuneConfig) -> TuneConfig:
    """Q-LoRA's weights are int4 unless said otherwise, as the guide's."""
    if settings.method == "qlora" and settings.precision is None:
        return replace(settings, precision="int4")
    return settings


def beyond(records: list[Record], tolerance: float | None) -> BeyondTolerance | None:
    """The error to raise when a plan was off: by more than TOLERANCE on a GPU, or `tolerance` anywhere."""
    for record in records:
        for figure in record.figures:
            allowed = tolerance if tolerance is not None else TOLERANCE.get(figure.name)
            if figure.error is None or allowed is None or (tolerance is None and record.facts["device"] == "cpu"):
                continue
            if figure.name in TOLERANCE and abs(figure.error) > allowed:
                cell = record.facts["cell"]
                return BeyondTolerance(
                    f"{record.model} {cell['method']} {cell['seq_len']}: {figure.name} was planned at "
                    f"{figure.planned:.4g} {figure.unit}, measured at {figure.measured:.4g}: "
                    f"{100 * figure.error:+.1f} %, beyond {100 * allowed:g} %.",
                    "repeat it while nothing else runs, or fit the constants of planning/finetune_qwenfit.py again",
                )
    return None
