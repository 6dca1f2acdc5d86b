"""The command line's finetuning verbs: tune, merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from qwenfit.errors import UsageError
from qwenfit.planning.task import FINETUNE_METHODS, OPTIMIZERS
from qwenfit.tune.config import (
    FORMATS,
    KEEPS,
    MASKS,
    MOMENTS,
    ON_LONG,
    PRECISIONS,
    SCHEDULES,
    TuneConfig,
    make_config,
)

Command = TypeVar("Command", bound=Callable[..., Any])

# One line for each setting of TuneConfig; those with a choice name it through CHOICES.
HELP = {
    "data": "file of samples, json, jsonl, parquet or txt; FILE@2.5 gives it a weight; may be repeated",
    "output": "folder of the run: checkpoints, metrics and the result",
    "eval_data": "file to evaluate with; may be repeated",
    "eval_share": "of the data's rows, kept for evaluation",
    "format": "of the data's rows  [as each file looks]",
    "on_long": "what a conversation longer than --seq-len meets; raw text is cut into pieces, and none of it is lost",
    "skip_bad": "leave bad rows out and count them, instead of stopping at the first",
    "method": "[lora; lora-emb where a base model meets ChatML; qlora for an int4 or int8 checkpoint]",
    "precision": "of the weights: bf16, fp32; for qlora int4 or int8  [the checkpoint's own]",
    "lora_rank": "more to learn with, more memory",
    "lora_alpha": "the adapter counts alpha / rank",
    "lora_dropout": "share of an adapter's inputs left out",
    "new_tokens": "train ChatML's rows of embedding and head too, and no others",
    "mask": "which tokens are trained; qwen1 is the official script's",
    "seq_len": "tokens of a sample; more takes more memory",
    "pack": "several samples in a row, without attention between them",
    "pad": "rows are --seq-len wide, as the guide measured; else as wide as a micro-batch's longest",
    "micro_batch": "rows at once; more is faster on a large GPU and takes more memory",
    "grad_accum": "micro-batches per optimizer step",
    "epochs": "times through the data",
    "max_steps": "optimizer steps  [as epochs say]",
    "lr": "learning rate  [3e-4 for adapters, 1e-5 for full]",
    "schedule": "of the learning rate after the warmup",
    "warmup": "share of the steps",
    "weight_decay": "of matrices",
    "beta1": "AdamW's",
    "beta2": "AdamW's",
    "eps": "AdamW's",
    "clip": "largest norm of the gradients; 0: never clip",
    "optimizer": "AdamW's weights and states: float32 masters, all in bf16 (least memory), or moments in 8 bits",
    "moments": "AdamW's states under fp32",
    "zero": "over several processes: 2 or 3 shards, 0 copies  [full 3, adapters 2, qlora 0]",
    "deepspeed": "shard by DeepSpeed with the official script's settings, not by torch's fully_shard",
    "keep": "for the backward pass; more memory, less time",
    "offload": "what is kept waits in host memory (GPU)",
    "eval_every": "steps; 0: once an epoch",
    "patience": "stop after so many evaluations without a better one; 0: never",
    "save_every": "steps between checkpoints",
    "keep_last": "checkpoints",
    "log_every": "steps between lines where there is no terminal",
    "max_bad_steps": "steps in a row whose loss is no number, before the run stops",
    "resume": "go on from the newest checkpoint that verifies",
    "seed": "of order, adapters and dropout",
    "device": "cpu or cuda  [the GPU with the most free memory, else the CPU]",
    "force": "run although the plan says that it does not fit",
    "tensorboard": "write TensorBoard's files too",
    "wandb": "project of Weights & Biases to report to",
}
CHOICES = {
    "format": FORMATS,
    "on_long": ON_LONG,
    "method": tuple(FINETUNE_METHODS),
    "precision": PRECISIONS,
    "mask": MASKS,
    "schedule": SCHEDULES,
    "optimizer": tuple(OPTIMIZERS),
    "moments": MOMENTS,
    "keep": KEEPS,
}
SHORT = {"output": "-o", "data": "-d"}
TYPES = {"int": int, "float": float, "str": str}


def setting_options(command: Command) -> Command:
    """An option for each setting but the model. Unset ones are None, so that a YAML file's values stand."""
    for f in reversed(fields(TuneConfig)):
        if f.name == "model":
            continue
        name, kind = "--" + f.name.replace("_", "-"), str(f.type).removesuffix(" | None")
        text = HELP[f.name] + ("" if f.default in (None, ()) or kind == "bool" else f"  [{f.default}]")
        if kind == "bool":
            option = click.option(f"{name}/--no-{name[2:]}", default=None, help=text)
        elif kind.startswith("tuple"):
            option = click.option(name, *_short(f.name), multiple=True, help=text)
        else:
            choice = click.Choice(CHOICES[f.name]) if f.name in CHOICES else TYPES[kind]
            option = click.option(name, *_short(f.name), type=choice, help=text)
        command = option(command)
    return command


def _short(name: str) -> tuple[str, ...]:
    return (SHORT[name],) if name in SHORT else ()


@click.command()
@click.argument("model", required=False)
@click.option("--config", "file", type=click.Path(path_type=Path), help="settings in YAML; flags win over them")
@click.option("--preview", type=click.IntRange(min=0), help="show so many samples, trained tokens marked, and leave")
@click.option("--json", "as_json", is_flag=True, help="print what became of the run as JSON at its end")
@setting_options
def tune(model: str | None, file: Path | None, preview: int | None, as_json: bool, **given: Any) -> int:
    """Finetune MODEL on conversations or text, in the memory that the plan says.

    \b
    qwenfit tune Qwen/Qwen2.5-0.5B-Instruct --data chats.jsonl
    qwenfit tune --config run.yaml --lr 1e-4
    qwenfit tune ./model --data chats.jsonl --preview 3
    """
    config = make_config({"model": model, **given}, file)
    from qwenfit.tune.verb import preview_samples, run

    if preview is not None:
        if as_json:
            raise UsageError("A preview is for eyes.", "Leave --json out, or --preview.")
        return preview_samples(config, preview, click.echo)
    return run(config, lambda text: click.echo(text, err=True), click.echo if as_json else None)


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--base", help="the 16-bit base model  [the one the adapter names]")
@click.option("--dtype", help="float32, float16 or bfloat16 of the result  [the base's]")
@click.option("--json", "as_json", is_flag=True, help="print the report as JSON")
def merge(adapter: Path, target: Path, base: str | None, dtype: str | None, as_json: bool) -> None:
    """Add ADAPTER to its base model's weights and write the result as a model folder TARGET."""
    from qwenfit.run.planned import stderr_progress
    from qwenfit.tune.merge import merge as run

    report = run(adapter, target, base=base, dtype=dtype, progress=stderr_progress("merging"))
    click.echo(json.dumps(asdict(report), indent=2, default=str, ensure_ascii=False) if as_json else report.text)
