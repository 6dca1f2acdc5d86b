"""The tables of the guide as claims, in its order: each figure with the plan for it and the bounds it must keep."""

from __future__ import annotations

from collections.abc import Iterator

from qwenfit.catalog import get_model, read_csv
from qwenfit.guide.bounds import with_line_bounds
from qwenfit.guide.cards import named_cards
from qwenfit.guide.finetune_claims import finetune_claims, qlora_minimum_claim, readme_finetune_claims
from qwenfit.guide.inference_claims import GUIDE_STACK, card_claim, inference_claims, kv_cache_claims, memory_claim
from qwenfit.guide.types import Claim

TITLES = {
    "models": "The models",
    "requirements": "Requirements by precision: memory, cards",
    "deployment": "Recommended deployment",
    "inference": "Inference on A100-SXM4-80GB, 2048 tokens",
    "kv_cache_batch": "KV cache quantization by batch",
    "kv_cache_length": "KV cache quantization by tokens generated",
    "finetune": "Finetuning on A100-SXM4-80GB",
    "readme": "The official README's finetuning rows that the guide changes or leaves out",
}


def guide_claims() -> list[Claim]:
    """Every figure of the guide, table by table."""
    claims = [
        *_models(),
        *_requirements(),
        *_deployment(),
        *inference_claims(),
        *kv_cache_claims("batch"),
        *kv_cache_claims("length"),
        *finetune_claims(),
    ]
    return with_line_bounds(claims)


def readme_claims() -> list[Claim]:
    """The official README's finetuning rows, as one more table."""
    return with_line_bounds(readme_finetune_claims())


def _models() -> Iterator[Claim]:
    for row in read_csv("guide/models.csv"):
        model = row["model"]
        for column, quantity in (("release_date", "release date"), ("pretrained_tokens", "pretraining tokens")):
            yield Claim("models", model, "", quantity, "", row[column], None)
        length = f"{get_model(model).context_length // 1024}K"
        yield Claim("models", model, "", "max length", "tokens", row["max_length"], length)
        yield qlora_minimum_claim("models", model, float(row["min_qlora_gb"]))
        yield memory_claim("models", model, "int4, 2048 tokens", "int4", float(row["min_int4_gb"]), 1)


def _requirements() -> Iterator[Claim]:
    for row in read_csv("guide/requirements.csv"):
        model, precision, own = row["model"], row["precision"], float(row["inference_memory_gb"])
        (least,) = named_cards(row["minimum_gpu"])
        yield memory_claim("requirements", model, precision, precision, own, least.count)
        yield card_claim("requirements", model, precision, "minimum GPU", least, own)
        for cards in named_cards(row["recommended_gpu"]) if row["recommended_gpu"] else ():
            yield card_claim("requirements", model, precision, "recommended GPU", cards, own)
        if row["qlora_finetuning_gb"]:
            yield qlora_minimum_claim("requirements", model, float(row["qlora_finetuning_gb"]))
        if row["generate_2048_int4_gb"]:
            int4 = float(row["generate_2048_int4_gb"])
            yield memory_claim("requirements", model, "int4, 2048 tokens", "int4", int4, 1)


def _deployment() -> Iterator[Claim]:
    own = {(r["model"], r["precision"]): r["memory_gb"] for r in read_csv("guide/inference.csv") if r["memory_gb"]}
    for row in read_csv("guide/deployment.csv"):
        model, _, engine = row["model"].partition(" + ")
        stack = "vllm" if engine == "vLLM" else GUIDE_STACK
        for cards in named_cards(row["recommended_configuration"]):
            precision = cards.precision or "bf16"
            figure = float(own[model, precision])
            yield card_claim("deployment", model, precision, "recommended GPU", cards, figure, stack)
