"""What the measurements of the engine on a GPU share; on a CPU a tiny model stands in, which shows that it all runs."""

from __future__ import annotations

import datetime
import gc
import importlib.metadata
import itertools
import os
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from torch import nn

from qwenfit.checkpoint.resolve import resolve_model
from qwenfit.config import ModelConfig
from qwenfit.engine.params import SamplingParams
from qwenfit.errors import NotFound
from qwenfit.model.linear import Linear
from qwenfit.model.transformer import Transformer

Figures = dict[str, Any]
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BLOCK_SIZE = 16


def need_gpu() -> None:
    """Exit, with one sentence, where there is nothing to measure."""
    if not GPU:
        print("This measures a CUDA GPU, and torch finds none here: `qwenfit doctor` says why.", file=sys.stderr)
        raise SystemExit(NotFound.exit_code)


def record_head(kind: str) -> Figures:
    """What each record begins with; `kind` is the module's name in words."""
    given = ["OUT" if before == "--out" else word for before, word in itertools.pairwise(["", *sys.argv[1:]])]
    return {
        "kind": kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m qwenfit.bench." + kind.replace(" ", "_"), *given]),
        "hardware": torch.cuda.get_device_name() if GPU else "no GPU: a tiny model",
        "versions": {
            "torch": torch.__version__, "triton": importlib.metadata.version("triton"), "cuda": torch.version.cuda,
        },
    }  # fmt: skip


def tiny(name: str) -> ModelConfig:
    """The config of `name` at the size of a test."""
    config = resolve_model(name)
    group = config.num_heads // config.num_kv_heads
    return replace(
        config, num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=4 // min(4, group), head_dim=16,
        intermediate_size=96, vocab_size=512, context_length=4096, training_length=64,
    )  # fmt: skip


def measured_config(name: str = "Qwen-7B") -> ModelConfig:
    return resolve_model(name) if GPU else tiny(name)


def random_network(config: ModelConfig, dtype: torch.dtype, device: str, bits: int | None = None) -> Transformer:
    """Weights of standard deviation 1 / sqrt(inputs), made where they stay; the linears of the layers in `bits`."""
    model = Transformer(config, dtype, "meta")
    for name, parameter in list(model.named_parameters()):
        module, _, leaf = name.rpartition(".")
        if bits is not None and module.endswith("_proj") and leaf == "weight":
            from qwenfit.bench.gpu_kernels import random_blocked

            out, inputs = parameter.shape
            owner = model.get_submodule(module)
            model.set_submodule(module, Linear(None, owner.bias, random_blocked(bits, inputs, out)))  # type: ignore[arg-type]
            continue
        values = torch.empty(parameter.shape, dtype=dtype, device=device)
        values.normal_(1.0 if "norm" in name else 0.0, 0.02 if values.dim() == 1 else values.shape[1] ** -0.5)
        setattr(model.get_submodule(module), leaf, nn.Parameter(values, requires_grad=False))
    return model.eval()


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def clean() -> None:
    gc.unfreeze()  # what an engine found at its start: `watch` ties its parts to each other
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def prompt(length: int, config: ModelConfig, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(config.vocab_size) for _ in range(length)]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.float() - reference.float()).norm() / reference.float().norm())


def used_bytes() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def kernels(run: Callable[[], object]) -> Figures:
    """Launches and microseconds of a run, and of the kernels that take the most: name -> [launches, us]."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
    totals: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_time:
            entry = totals.setdefault(event.name[:70], [0, 0.0])
            entry[0] += 1
            entry[1] += event.device_time
    top = dict(sorted(totals.items(), key=lambda item: -item[1][1])[:14])
    return {"launches": sum(n for n, _ in totals.values()), "gpu_us": sum(us for _, us in totals.values()), "top": top}
