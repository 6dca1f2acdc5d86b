"""The loss of twenty steps equals that of transformers and PEFT, from the same weights and the same data."""

from __future__ import annotations

import pytest
import torch
from tune.tiny import TARGETS, hf_model, losses_of, network, settings, source, whole

from qwenfit.tune.adapters import LoRA, add_lora, train_rows, train_tables
from qwenfit.tune.peft_format import read_adapter, restore

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def peft_losses(model, config, data) -> list[float]:
    """The textbook loop: torch's AdamW, transformers' cosine, clipping, one divisor for the accumulated step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, config.learning_rate, (config.beta1, config.beta2), config.eps)
    warmup = int(config.warmup * config.max_steps)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, config.max_steps)
    model.train()
    found = []
    for step in range(config.max_steps):
        batches = [data.batch(*divmod(step * config.grad_accum + i, len(data))) for i in range(config.grad_accum)]
        tokens = sum(int((b.labels[:, 1:] != -100).sum()) for b in batches)
        total = 0.0
        for batch in batches:
            loss = model(**whole(batch), num_items_in_batch=tokens).loss
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        found.append(total)
    return found


CASES = {
    "full": ({"method": "full", "lr": 1e-3}, None),
    "lora": ({"method": "lora"}, {}),
    "lora-emb": ({"method": "lora-emb"}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "rows": ({"new_tokens": True}, {"trainable_token_indices": {"embed_tokens": [3, 7], "lm_head": [3, 7]}}),
}


RUNS = [(case, kind, kind == "qwen3", "inputs") for case in CASES for kind in ("qwen2", "qwen3")]


@pytest.mark.parametrize(
    ("case", "kind", "tied", "keep"), [*RUNS, ("lora", "qwen2", False, "attention"), ("lora", "qwen2", False, "all")]
)
def test_losses_are_those_of_transformers_and_peft(tmp_path, case, kind, tied, keep):
    changes, peft_options = CASES[case]
    base = hf_model(kind, tied)
    base.save_pretrained(tmp_path / "base")
    config = settings(tmp_path / "base", keep=keep, **changes)
    data = source()
    model = network(tmp_path / "base")
    theirs = base
    if peft_options is None:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    else:
        theirs = adapted(base, config, peft_options | ({"ensure_weight_tying": True} if tied else {}))
        theirs.save_pretrained(tmp_path / "start")
        add_lora(model, LoRA(config.lora_rank, config.lora_alpha, 0.0))
        if case == "lora-emb":
            train_tables(model)
        if case == "rows":
            train_rows(model, [3, 7])
        restore(model, read_adapter(tmp_path / "start", model.config))
    wanted = peft_losses(theirs, config, data)
    got = losses_of(model, config, data)
    worst = max(abs(a - b) for a, b in zip(got, wanted, strict=True))
    assert wanted[-1] < wanted[0] - 0.1  # there is something to agree on
    assert worst < 1e-4, (worst, got, wanted)


def adapted(base, config, options):
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
        **options,
    )
    return get_peft_model(base, lora)


@pytest.mark.parametrize(("optimizer", "moments", "tolerance"), [("fp32", "bf16", 0.01), ("8bit", "bf16", 0.05)])
def test_smaller_moments_follow_the_same_curve(tmp_path, optimizer, moments, tolerance):
    hf_model().save_pretrained(tmp_path / "base")
    curves = []
    for change in ({}, {"optimizer": optimizer, "moments": moments}):
        config = settings(tmp_path / "base", method="full", lr=1e-3, **change)
        model = network(tmp_path / "base")
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        curves.append(losses_of(model, config, source()))
    exact, smaller = curves
    assert max(abs(a - b) for a, b in zip(exact, smaller, strict=True)) < tolerance * (exact[0] - exact[-1])
    assert exact != smaller
