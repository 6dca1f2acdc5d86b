"""The training loop: accumulate, clip, step, report, evaluate, save. Everything else is handed in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qwenfit.errors import QwenfitError
from qwenfit.model.transformer import Transformer
from qwenfit.planning.finetune_qwenfit import micro_batches_per_pass
from qwenfit.tune.adapters import head_weight, token_rows
from qwenfit.tune.batch import IGNORE, BatchSource, TrainBatch, merged, targets_of
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.optimizer import AdamW, learning_rate_factor
from qwenfit.tune.state import State
from qwenfit.tune.world import World

DONE, STOPPED, NO_PROGRESS = "done", "stopped", "no improvement"


@dataclass
class Hooks:
    """What the loop calls: all of them on every process."""

    report: Callable[[dict[str, Any]], None]  # one row of metrics
    save: Callable[[State], None]
    should_stop: Callable[[], bool] = lambda: False
    world: World = field(default_factory=World)


class Diverged(QwenfitError):
    """The loss was no number for several steps in a row."""


def total_steps(config: TuneConfig, batches: int, world_size: int = 1) -> int:
    """Optimizer steps of a run over a source of `batches` micro-batches; the last may be smaller than the others."""
    if config.max_steps is not None:
        return config.max_steps
    return max(1, math.ceil(round(config.epochs * batches, 6) / (config.grad_accum * world_size)))


def train(
    model: Transformer,
    optimizer: AdamW,
    source: BatchSource,
    evaluation: BatchSource | None,
    config: TuneConfig,
    state: State,
    hooks: Hooks,
) -> str:
    """Run from `state`, which is kept up to date, to the end; returns DONE, STOPPED (asked to) or NO_PROGRESS.

    A step whose loss or gradient is no finite number changes no weights; `max_bad_steps` of them in a row raise
    Diverged, after the state before them was saved.
    """
    total = total_steps(config, len(source), hooks.world.size)
    warmup = math.ceil(config.warmup * total)
    good = replace(state)
    model.train()
    while state.step < total:
        started = time.perf_counter()
        batches = next_batches(source, config, state, hooks.world)
        lr = config.learning_rate * learning_rate_factor(state.step, total, warmup, config.schedule)
        row, bad = train_step(model, optimizer, batches, config, lr, hooks.world)
        state.step += 1
        state.position += config.grad_accum * hooks.world.size
        state.tokens += row["tokens"]
        state.bad_steps = state.bad_steps + 1 if bad else 0
        row |= {"step": state.step, "of": total, "epoch": state.position / len(source), "lr": lr}
        hooks.report(row | {"seconds": time.perf_counter() - started} | ({"bad": bad} if bad else {}))
        if bad and state.bad_steps >= config.max_bad_steps:
            hooks.save(good)
            raise _diverged(config, state, good, bad)
        if not bad:
            good = replace(state)
        improved = False
        if evaluation is not None and _evaluation_due(config, state, total, len(source), hooks.world.size):
            improved = _evaluate(model, evaluation, config, state, hooks)
            good = replace(state) if not bad else good
        if config.patience and state.stale >= config.patience:
            hooks.save(state)
            return NO_PROGRESS
        stopping = hooks.world.total(hooks.should_stop()) > 0  # all stop together, whoever was asked to
        if stopping or improved or state.step == total or state.step % config.save_every == 0:
            hooks.save(state)
        if stopping and state.step < total:
            return STOPPED
    return DONE


def next_batches(source: BatchSource, config: TuneConfig, state: State, world: World) -> list[TrainBatch]:
    """This process's micro-batches of one step; epochs follow each other without a gap."""
    last = math.inf if config.max_steps is not None else round(config.epochs * len(source), 6)
    firsts = [state.position + i * world.size for i in range(config.grad_accum)]
    return [_own(source, p, world, last) for p in firsts if p < last]


def _own(source: BatchSource, first: int, world: World, last: float) -> TrainBatch:
    """This process's micro-batch of those that begin at position `first`; blank where there are none left for it.

    All processes take the same number, since a shard's owner must be there when the others gather it.
    """
    own = first + world.rank
    if own < last:
        return source.batch(*divmod(own, len(source)))
    batch = source.batch(*divmod(first, len(source)))
    return replace(batch, labels=torch.full_like(batch.labels, IGNORE), sources=[])


def train_step(
    model: Transformer, optimizer: AdamW, batches: list[TrainBatch], config: TuneConfig, lr: float, world: World
) -> tuple[dict[str, Any], list[str]]:
    """One optimizer step; (loss, tokens, gradient norm), and the sources of the samples that spoilt it, if any."""
    tokens = int(world.total(sum(trained_tokens(batch) for batch in batches)))
    tokens_each, hidden = config.micro_batch * config.seq_len, model.config.hidden_size
    batches = merged(batches, micro_batches_per_pass(tokens_each, hidden, config.grad_accum, _gpu_bytes(world.device)))
    losses: list[Tensor] = []
    for number, batch in enumerate(batches, 1):
        loss = world.loss(
            model,
            batch,
            max(tokens, 1),
            last=number == len(batches),
            keep=config.keep,
            offload=config.offload,
            head_sink=None if world.sharded else _head_sink(model, optimizer),
            nest=not world.sharded,
        )
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        losses.append(loss.detach())
    world.sum_gradients(optimizer)
    norm = world.gradient_norm(optimizer)
    each = torch.stack(losses).tolist()
    loss_sum = world.total(sum(each))
    bad: list[str] = []
    if not math.isfinite(loss_sum) or not math.isfinite(norm):
        spoilt = [batch for batch, value in zip(batches, each, strict=True) if not math.isfinite(value)]
        bad = [name for batch in spoilt or batches for name in batch.sources]
    else:
        scale = min(1.0, config.clip / (norm + 1e-6)) if config.clip else 1.0
        optimizer.step(lr, scale)
        if (rows := token_rows(model)) is not None:
            rows.write(model)
    optimizer.zero()
    return {"loss": loss_sum, "gradient_norm": norm, "tokens": tokens}, bad


def _gpu_bytes(device: torch.device) -> float:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def trained_tokens(batch: TrainBatch) -> int:
    return int((targets_of(batch) != IGNORE).sum())


def _head_sink(model: Transformer, optimizer: AdamW) -> Tensor | None:
    """The float32 buffer of a trained 16-bit head's gradient."""
    head = head_weight(model) if not (model.lm_head is not None and model.lm_head.weight is None) else None
    if head is None or not head.requires_grad:
        return None
    names = [name for name, p in optimizer.parameters.items() if p is head]
    return optimizer.buffers.get(names[0]) if names else None


def _evaluation_due(config: TuneConfig, state: State, total: int, batches: int, world_size: int) -> bool:
    if config.eval_every:
        return state.step % config.eval_every == 0 or state.step == total
    before = state.position - config.grad_accum * world_size
    return state.position // batches > before // batches or state.step == total


def _evaluate(model: Transformer, source: BatchSource, config: TuneConfig, state: State, hooks: Hooks) -> bool:
    """Evaluate and note the result in `state`; whether it is the best so far."""
    loss = evaluate(model, source, hooks.world)
    hooks.report({"step": state.step, "eval_loss": loss})
    improved = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
    if improved:
        state.best_loss, state.best_step, state.stale = loss, state.step, 0
    else:
        state.stale += 1
    return improved and config.patience > 0


@torch.no_grad()
def evaluate(model: Transformer, source: BatchSource, world: World) -> float:
    """Mean cross entropy per trained token over the whole source, without dropout."""
    model.eval()
    loss, tokens = 0.0, 0
    for first in range(0, len(source), world.size):
        batch = _own(source, first, world, len(source))
        loss += float(world.loss(model, batch, 1.0, keep="all"))
        tokens += trained_tokens(batch)
    model.train()
    return world.total(loss) / max(1.0, world.total(tokens))


def _diverged(config: TuneConfig, state: State, good: State, sources: list[str]) -> Diverged:
    shown = ", ".join(sources[:8]) + (f" and {len(sources) - 8} more" if len(sources) > 8 else "")
    return Diverged(
        f"The loss was no finite number in {state.bad_steps} steps in a row, the last time in step {state.step} with "
        f"{shown}; the state after step {good.step} is saved.",
        f"Look at those samples. To pass over them: --resume --max-bad-steps {10 * config.max_bad_steps}. "
        "To train with others or a lower --lr: another --output.",
    )
