"""The finetuning tables as claims: the guide's, and the official README's where the guide changes it or stops short.

An iteration is 8 micro-batches of one sample. Memory is what the process holds, in GB (10^9 bytes). The guide does
not say what its memory on several cards is; it is read as that of one card, since as a sum it would be smaller than
the weights of 72B and far below the states of a full-parameter run. The README's rows on several cards are sums
(162.0 GB on two cards of 85.9 GB), shown here divided by the cards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qwenfit.catalog import get_model, read_csv
from qwenfit.guide import bounds
from qwenfit.guide.inference_claims import GUIDE_CARD, GUIDE_STACK
from qwenfit.guide.types import MEMORY, S_PER_ITER, Claim, Line
from qwenfit.hardware import Hardware, find_device
from qwenfit.planning.constants import GB
from qwenfit.planning.planner import build_plan
from qwenfit.planning.stack import get_stack
from qwenfit.planning.task import Finetune
from qwenfit.planning.types import Plan

METHODS = {"LoRA (emb)": "lora-emb", "Q-LoRA": "qlora", "Full-parameter": "full", "LoRA": "lora"}


@dataclass(frozen=True)
class _Run:
    """One row of a finetuning table."""

    table: str
    model: str
    label: str  # the method as the table names it
    nodes: int
    gpus: int  # of all nodes
    seq_len: int
    memory_gb: float  # on one card
    s_per_iter: float
    confirmed: bool = False

    @property
    def method(self) -> str:
        """`LoRA + DeepSpeed ZeRO 3` is "lora": the method that the label begins with."""
        return next(method for label, method in METHODS.items() if self.label.startswith(label))

    @property
    def task(self) -> Finetune:
        zero = 3 if "zero" in self.label.lower() else None
        return Finetune(method=self.method, seq_len=self.seq_len, zero=zero)

    @property
    def hardware(self) -> Hardware:
        return Hardware(find_device(GUIDE_CARD), self.gpus // self.nodes, self.nodes)

    @property
    def where(self) -> str:
        cards = f"{self.gpus} GPUs, " if self.gpus > 1 else ""
        return f"{self.label}, {cards}{self.seq_len} tokens"

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.model, self.method, self.gpus, self.seq_len

    def plan(self) -> Plan:
        precision = "int4" if self.method == "qlora" else "bf16"
        return build_plan(get_model(self.model), self.hardware, self.task, precision, get_stack(GUIDE_STACK))


def finetune_claims() -> Iterator[Claim]:
    """Memory and seconds per iteration of finetune.csv."""
    official = {run.key: run for run in _readme_runs()}
    for row in read_csv("guide/finetune.csv"):
        run = _Run(
            table="finetune",
            model=row["model"],
            label=row["method"],
            nodes=int(row["nodes"]),
            gpus=int(row["gpus"]),
            seq_len=int(row["seq_len"]),
            memory_gb=float(row["memory_gb"]),
            s_per_iter=float(row["s_per_iter"]),
            confirmed=row["in_official_readme"] == "yes",
        )
        yield from _claims(run, official.get(run.key))


def readme_finetune_claims() -> Iterator[Claim]:
    """The same for readme_finetune.csv, the official README's rows."""
    for run in _readme_runs():
        yield from _claims(run, None)


def _readme_runs() -> Iterator[_Run]:
    for row in read_csv("guide/readme_finetune.csv"):
        gpus = int(row["gpus_total"])
        yield _Run(
            table="readme",
            model=row["model"],
            label=row["method"],
            nodes=int(row["nodes"]),
            gpus=gpus,
            seq_len=int(row["seq_len"]),
            memory_gb=float(row["memory_gb_summed_over_gpus"]) / gpus,
            s_per_iter=float(row["s_per_iter"]),
        )


def qlora_minimum_claim(table: str, model: str, stated: float) -> Claim:
    """The Q-LoRA figure of another table: that of the finetuning table at its shortest, 256 tokens."""
    run = _Run(table, model, "Q-LoRA", 1, 1, 256, stated, s_per_iter=0.0)
    return _memory_claim(run, run.plan(), None)


def _claims(run: _Run, official: _Run | None) -> tuple[Claim, Claim]:
    plan = run.plan()
    return _memory_claim(run, plan, official), _time_claim(run, plan, official)


def _memory_claim(run: _Run, plan: Plan, official: _Run | None) -> Claim:
    several = official is not None and official.gpus > 1
    return Claim(
        table=run.table,
        model=run.model,
        where=run.where,
        quantity=MEMORY,
        unit="GB per GPU",
        stated=run.memory_gb,
        predicted=plan.memory.process / GB,
        tested=run.memory_gb,
        official=official.memory_gb if official else None,
        confirmed=run.confirmed,
        fits=plan.fits,
        bounds=(
            bounds.states_least(plan.model, plan.hardware, run.task),
            bounds.card_capacity(plan.hardware, 1, GB),
            *bounds.run_exists(plan.model, plan.hardware, run.task),
        ),
        line=Line(f"{run.table} {run.model} {run.label} memory", "tokens", convex=False),
        position=run.seq_len,
        same=f"finetuning {run.key}",
        remark=f"the README gives {official.memory_gb * run.gpus:.1f} GB, a sum over {run.gpus} GPUs"
        if official and several
        else "",
    )


def _time_claim(run: _Run, plan: Plan, official: _Run | None) -> Claim:
    floors = [
        bounds.compute_floor(plan.model, plan.hardware, run.task),
        *bounds.run_exists(plan.model, plan.hardware, run.task),
    ]
    if plan.parallel == "zero3":
        floors.append(bounds.zero3_link_floor(plan.model, plan.hardware, run.task))
    return Claim(
        table=run.table,
        model=run.model,
        where=run.where,
        quantity=S_PER_ITER,
        unit="s",
        stated=run.s_per_iter,
        predicted=plan.speed.seconds_per_iter,
        tested=run.s_per_iter,
        official=official.s_per_iter if official else None,
        confirmed=run.confirmed,
        fits=plan.fits,
        bounds=tuple(floors),
        line=Line(f"{run.table} {run.model} {run.label} time", "tokens", convex=False),
        position=run.seq_len,
        remark="the network between the nodes is not stated, and planned at 100 Gb/s" if run.nodes > 1 else "",
    )
