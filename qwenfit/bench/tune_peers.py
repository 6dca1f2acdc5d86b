"""The same cell by transformers and PEFT, and with Liger-Kernel where it is installed: what users would run instead."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from typing import Any

import torch

from qwenfit.bench.memory import process_bytes
from qwenfit.config import ModelConfig
from qwenfit.errors import UsageError, missing_extra
from qwenfit.planning.planner import resolve
from qwenfit.run.planned import run_device
from qwenfit.tune.config import TuneConfig

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def bench_peers(settings: TuneConfig, steps: int) -> list[dict[str, Any]]:
    """One result for each software that is installed. Raises UsageError for a method that is not compared."""
    if settings.method not in ("lora", "full"):
        raise UsageError(f"{settings.method} is not compared with other software.", "--method lora or --method full")
    for package in ("transformers", "peft"):
        if importlib.util.find_spec(package) is None:
            raise missing_extra(package, "tune")
    results = [_run(settings, steps, liger=False)]
    if importlib.util.find_spec("liger_kernel") is not None:
        results.append(_run(settings, steps, liger=True))
    return results


def _run(settings: TuneConfig, steps: int, liger: bool) -> dict[str, Any]:
    """The textbook loop: micro-batch by micro-batch, checkpointing, clipping, torch's fused AdamW where it runs."""
    device = "cpu" if run_device(settings.device).kind == "cpu" else "cuda"
    config = resolve(settings.model)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = _model(config, settings, device, liger)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, settings.learning_rate, (settings.beta1, settings.beta2), fused=device == "cuda"
    )
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.micro_batch, settings.seq_len)
    seconds, losses = [], []
    for _ in range(1 + steps):
        started = time.perf_counter()
        total = torch.zeros((), device=device)
        for _ in range(settings.grad_accum):
            ids = torch.randint(0, config.vocab_size, shape, generator=generator).to(device)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss / settings.grad_accum
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))  # waits for the device
        seconds.append(time.perf_counter() - started)
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else process_bytes(device)
    return {
        "model": config.name,
        "method": settings.method,
        "seq_len": settings.seq_len,
        "software": _named(liger),
        "s_per_iter": statistics.median(seconds[1:]),
        "memory_gb": memory / 1e9,
        "losses": losses,
    }


def _named(liger: bool) -> str:
    from importlib.metadata import version

    name = f"transformers {version('transformers')} + peft {version('peft')}"
    return f"{name} + liger {version('liger-kernel')}" if liger else name


def _model(config: ModelConfig, settings: TuneConfig, device: str, liger: bool) -> Any:
    import peft
    import transformers

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2  # type: ignore[import-not-found]

        apply_liger_kernel_to_qwen2()
    theirs = transformers.Qwen2Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=max(config.context_length, settings.seq_len),
        tie_word_embeddings=config.tie_word_embeddings,
        rms_norm_eps=config.rms_norm_eps,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if settings.precision == "fp32" else torch.bfloat16)
    try:
        with torch.device(device):
            theirs._attn_implementation = "sdpa"
            model: Any = transformers.Qwen2ForCausalLM(theirs)
    finally:
        torch.set_default_dtype(before)
    if settings.method == "lora":
        lora = peft.LoraConfig(
            r=settings.lora_rank,
            lora_alpha=int(settings.lora_alpha),
            lora_dropout=settings.lora_dropout,
            target_modules=TARGETS,
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, lora)
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()
