"""Statements that hold for every plan, tried on sizes that hypothesis chooses."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwenfit.catalog import dense_model_names, get_model
from qwenfit.errors import UsageError
from qwenfit.hardware import Hardware, all_devices, find_device
from qwenfit.planning.planner import build_plan, choose_precision, plan
from qwenfit.planning.stack import STACKS, get_stack
from qwenfit.planning.task import FINETUNE_METHODS, TASKS, Finetune, Inference
from qwenfit.planning.types import Plan
from qwenfit.planning.weights import weight_bytes

A100 = find_device("A100-SXM4-80GB")
models = st.sampled_from(dense_model_names())
stacks = st.sampled_from(sorted(STACKS))
trainers = st.sampled_from([s for s in sorted(STACKS) if s != "vllm"])
methods = st.sampled_from(FINETUNE_METHODS)
tokens = st.integers(1, 8192)
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def infer(model: str, stack: str, precision: str = "bf16", gpus: int = 1, **sizes: object) -> Plan:
    task = Inference(**sizes)  # type: ignore[arg-type]
    way = "layers" if gpus > 1 else None
    return build_plan(get_model(model), Hardware(A100, gpus), task, precision, get_stack(stack), way)


def train(model: str, stack: str, method: str, gpus: int = 1, **sizes: object) -> Plan:
    task = Finetune(method, **sizes)  # type: ignore[arg-type]
    precision = "int4" if method == "qlora" else "bf16"
    return build_plan(get_model(model), Hardware(A100, gpus), task, precision, get_stack(stack))


@quick
@given(models, trainers, tokens, tokens, tokens, st.integers(1, 64), st.sampled_from(["bf16", "int8"]))
def test_more_context_or_requests_never_need_less(
    model: str, stack: str, prompt: int, generate: int, more: int, batch: int, cache: str
) -> None:
    sizes = {"prompt": prompt, "generate": generate, "batch": batch, "kv_cache": cache}
    base = infer(model, stack, **sizes).memory.process
    for key in ("prompt", "generate", "batch"):
        assert infer(model, stack, **sizes | {key: sizes[key] + more}).memory.process >= base  # type: ignore[operator]


@quick
@given(
    models, trainers, methods, tokens, tokens, st.integers(1, 8), st.booleans(), st.sampled_from([None, True, False])
)
def test_longer_or_more_samples_or_a_higher_rank_never_need_less(
    model: str, stack: str, method: str, length: int, more: int, batch: int, checkpointing: bool, fused: bool | None
) -> None:
    sizes = {"seq_len": length, "micro_batch": batch, "checkpointing": checkpointing, "fused_loss": fused}
    base = train(model, stack, method, **sizes)
    for change in ({"seq_len": length + more}, {"micro_batch": batch + more}, {"lora_rank": 64 + more}):
        assert train(model, stack, method, **sizes | change).memory.process >= base.memory.process
    slower = train(model, stack, method, **sizes | {"seq_len": length + more})
    # Samples of another length may come to passes that fill the card better, by some per mille.
    assert slower.speed.seconds_per_iter >= 0.99 * base.speed.seconds_per_iter  # type: ignore[operator]


@pytest.mark.parametrize("stack", sorted(STACKS))
@pytest.mark.parametrize("name", dense_model_names())
def test_int4_is_smaller_than_int8_and_int8_than_bf16(name: str, stack: str) -> None:
    sizes = [weight_bytes(get_model(name), p, stack).total for p in ("int4", "int8", "bf16", "fp32")]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4


@quick
@given(models, trainers, st.integers(1, 15), tokens, st.sampled_from(["bf16", "int8", "int4"]))
def test_another_gpu_never_makes_the_fullest_one_fuller(
    model: str, stack: str, gpus: int, prompt: int, precision: str
) -> None:
    tied_head = 2 * get_model(model).embedding_parameters if get_model(model).tie_word_embeddings else 0
    fewer, more = (infer(model, stack, precision, n, prompt=prompt).memory.process for n in (gpus, gpus + 1))
    # A tied head is stored once more where it is used, which a small model on two GPUs may feel.
    assert more <= fewer + 1.07 * tied_head


@quick
@given(models, stacks, st.integers(1, 64), tokens)
def test_what_vllm_or_any_stack_fits_with_more_requests_it_fits_with_fewer(
    model: str, stack: str, batch: int, prompt: int
) -> None:
    more, fewer = (infer(model, stack, prompt=prompt, batch=b) for b in (2 * batch, batch))
    assert fewer.fits or not more.fits


@pytest.mark.parametrize("stack", sorted(STACKS))
@pytest.mark.parametrize("task", TASKS)
def test_every_model_on_every_card_has_a_finite_plan(task: str, stack: str) -> None:
    if stack == "vllm" and task != "inference":
        with pytest.raises(UsageError, match="does not finetune"):
            plan("Qwen-7B", task, gpu=A100, stack=stack)
        return
    sizes = Inference() if task == "inference" else Finetune(task)
    for name, device in product(dense_model_names(), all_devices()):
        config = get_model(name)
        for asked in ("int8", "int4") if task == "qlora" else ("bf16", "int4") if task == "inference" else ("bf16",):
            precision = choose_precision(config, sizes, device, asked)
            made = build_plan(config, Hardware(device), sizes, precision, get_stack(stack))
            _check_finite(made)


BOUNDS = ("memory bandwidth", "compute", "host", "link")


def _check_finite(made: Plan) -> None:
    where = f"{made.model.name} {made.precision} {made.hardware.device.name}"
    speed = made.speed
    numbers = [speed.tokens_per_s, speed.interval.low, speed.interval.high, made.memory.process]
    numbers += [x for x in (speed.seconds_per_iter, speed.time_to_first_token) if x is not None]
    assert all(math.isfinite(x) and x > 0 for x in numbers), where
    assert speed.interval.low < speed.tokens_per_s < speed.interval.high, where
    for value, span in (
        (speed.seconds_per_iter, speed.seconds_per_iter_interval),
        (speed.tokens_per_s_per_request, speed.tokens_per_s_per_request_interval),
        (speed.time_to_first_token, speed.time_to_first_token_interval),
    ):
        assert (value is None) is (span is None), where
        assert value is None or (span is not None and span.low < value < span.high), where
    assert speed.bound in BOUNDS and speed.time_to_first_token_bound in (None, *BOUNDS), where
    assert made.memory.process >= weight_bytes(made.model, made.precision, made.stack).total, where
    assert made.verdict in ("fits", "tight", "does not fit")
    assert (made.headroom >= 0) or made.verdict == "does not fit", where


@quick
@given(models, stacks, st.sampled_from([d.name for d in all_devices()]), st.sampled_from(["bf16", "int8", "int4"]))
def test_decoding_is_never_faster_than_the_card_can_read_the_weights(
    model: str, stack: str, card: str, precision: str
) -> None:
    made = plan(model, gpu=card, stack=stack, precision=precision, advise=False)
    read = weight_bytes(made.model, made.precision, stack).read_per_token
    assert made.speed.tokens_per_s <= made.hardware.device.bandwidth / read


@quick
@given(models, trainers, methods, tokens, st.sampled_from([d.name for d in all_devices() if d.kind == "gpu"]))
def test_training_is_never_faster_than_the_card_can_multiply(
    model: str, stack: str, method: str, length: int, card: str
) -> None:
    made = plan(model, method, gpu=card, stack=stack, seq_len=length, advise=False)
    config, device = made.model, made.hardware.device
    matrix = config.num_layers * config.linear_parameters_per_layer + config.embedding_parameters
    least = 8 * length * 4 * matrix / max(device.flops.values())  # forward and input gradient alone
    assert made.speed.seconds_per_iter is not None and made.speed.seconds_per_iter > least
