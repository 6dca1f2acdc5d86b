"""Tiny checkpoints made by transformers, batches for them, and the trainer's parts put together on them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from qwenfit.checkpoint.load import load_model
from qwenfit.tune.adapters import trained_parameters
from qwenfit.tune.batch import IGNORE, Sample, TrainBatch
from qwenfit.tune.config import TuneConfig
from qwenfit.tune.loop import Hooks, train
from qwenfit.tune.optimizer import AdamW
from qwenfit.tune.source import Rows
from qwenfit.tune.state import State

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCAB = 320


def hf_model(kind: str = "qwen2", tied: bool = False, seed: int = 0, **more):
    """A random transformers model of 2 layers, with biases and norms that matter; `more`: other sizes."""
    import transformers

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
    } | more
    if kind == "qwen3":
        model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**sizes, head_dim=16))
    else:
        model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().eval()


def save_hf(folder: Path, **options) -> Path:
    hf_model(**options).save_pretrained(folder)
    return folder


def network(folder: Path, precision: str = "fp32"):
    return load_model(folder, precision=precision)[0]


def samples(count: int = 40, seed: int = 1, longest: int = 24) -> list[Sample]:
    """Random tokens; the first third of each sample is not trained."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        length = int(torch.randint(8, longest + 1, (1,), generator=generator))
        ids = torch.randint(0, VOCAB, (length,), generator=generator).tolist()
        labels = [IGNORE] * (length // 3) + ids[length // 3 :]
        found.append(Sample(ids, labels, f"train.jsonl:{i + 1}"))
    return found


def source(count: int = 40, micro_batch: int = 2, seq_len: int = 24, seed: int = 1, **options) -> Rows:
    return Rows([[s] for s in samples(count, seed, seq_len)], seq_len, micro_batch, pad_id=0, **options)


def settings(folder: Path | str, **changes) -> TuneConfig:
    """Twenty steps without dropout, in float32 on the CPU."""
    base = {
        "model": str(folder),
        "method": "lora",
        "precision": "fp32",
        "device": "cpu",
        "lora_rank": 4,
        "lora_alpha": 8.0,
        "lora_dropout": 0.0,
        "seq_len": 24,
        "micro_batch": 2,
        "grad_accum": 2,
        "max_steps": 20,
        "lr": 3e-3,
        "warmup": 0.1,
        "moments": "fp32",
    }
    return TuneConfig(**base | changes)


def optimizer_of(model, config: TuneConfig) -> AdamW:
    return AdamW(
        trained_parameters(model),
        config.optimizer,
        moments={"bf16": torch.bfloat16, "fp32": torch.float32}[config.moments],
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        seed=config.seed,
    )


def losses_of(model, config: TuneConfig, data) -> list[float]:
    """The loss of each step of a run."""
    rows: list[dict] = []
    train(model, optimizer_of(model, config), data, None, config, State(), Hooks(rows.append, lambda state: None))
    return [row["loss"] for row in rows]


def whole(batch: TrainBatch) -> dict[str, torch.Tensor]:
    """A batch as transformers takes it."""
    mask = torch.ones_like(batch.input_ids)
    return {"input_ids": batch.input_ids, "attention_mask": mask, "labels": batch.labels}


def tune_tiny(config: TuneConfig, say=lambda text: None, data=None, evaluation=None) -> int:
    """`tune` on random samples; `data` replaces them."""
    from qwenfit.tune.run import Data, tune

    def load(config: TuneConfig, base: object) -> Data:
        made = source(micro_batch=config.micro_batch, seq_len=config.seq_len, seed=1)
        return Data(data or made, evaluation)

    return tune(config, load, say)


def result_of(output: Path) -> dict[str, bytes]:
    """The bytes of everything a run ends with, its last checkpoint's state included."""
    last = max((output / "checkpoints").iterdir())
    files = [*last.glob("*.safetensors"), *(output / "adapter").glob("*.safetensors")]
    return {str(path.relative_to(output)): path.read_bytes() for path in files} | {
        "state": str(json.loads((last / "state.json").read_text())["random"]).encode()
    }
