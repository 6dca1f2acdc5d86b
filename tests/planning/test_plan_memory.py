"""How memory parts add up, on one device and on several, for every stack."""

from __future__ import annotations

from itertools import product

import pytest

from qwenfit.errors import UsageError
from qwenfit.hardware import Hardware, find_device
from qwenfit.planning.finetune_memory import lora_parameters, states_lower_bound
from qwenfit.planning.planner import plan
from qwenfit.planning.search import replan, what_fits
from qwenfit.planning.task import Finetune, Inference
from qwenfit.planning.types import Plan
from qwenfit.planning.weights import weight_bytes

A100, OLD = "A100-SXM4-80GB", "transformers-4.3x"
STACKS = (OLD, "transformers-5", "vllm", "qwenfit")
TASKS = ("inference", "full", "lora", "lora-emb", "qlora")


def make(model: str, task: str = "inference", **options: object) -> Plan:
    return plan(model, task, **({"gpu": A100, "advise": False} | options))  # type: ignore[arg-type]


CASES = [(t, s, n) for t, s, n in product(TASKS, STACKS, (1, 2, 4)) if not (s == "vllm" and t != "inference")]


@pytest.mark.parametrize(("task", "stack", "gpus"), CASES)
def test_parts_sum_to_the_totals_and_the_fullest_device_is_the_one_shown(task: str, stack: str, gpus: int) -> None:
    made = make("Qwen-7B", task, stack=stack, gpus=gpus)
    assert len(made.memory_per_device) == gpus
    for memory in made.memory_per_device:
        parts = [getattr(memory, part) for part in memory.PARTS]
        assert all(isinstance(part, int) and part >= 0 for part in parts)
        assert sum(parts) == memory.allocated
        assert memory.allocated <= memory.reserved <= memory.process
        assert memory.process - memory.reserved == memory.context
    assert made.memory.process == max(m.process for m in made.memory_per_device)
    assert made.headroom == made.capacity - made.memory.process


@pytest.mark.parametrize("name", ["Qwen-14B", "Qwen2.5-0.5B"])
def test_layers_placed_in_order_put_the_embedding_first_and_the_head_last(name: str) -> None:
    made = make(name, gpus=3, stack="qwenfit")
    weights = weight_bytes(made.model, "bf16", "qwenfit")
    first, middle, last = (m.weights for m in made.memory_per_device)
    per_device = weights.layer * (made.model.num_layers // 3)
    assert first - per_device in (weights.embedding, weights.embedding + weights.layer)
    assert middle % weights.layer == 0
    head = weights.head or weights.embedding  # a tied head is copied to where it is used
    assert last == per_device + weights.final_norm + head
    copied = 0 if weights.head else weights.embedding
    assert first + middle + last == weights.total + copied
    assert made.memory_per_device[1].logits == 0


def test_the_caches_of_several_devices_are_the_whole_cache() -> None:
    one, four = make("Qwen-14B", context=8192), make("Qwen-14B", context=8192, gpus=4)
    assert sum(m.kv_cache for m in four.memory_per_device) == one.memory.kv_cache


@pytest.mark.parametrize(("stage", "method"), [(2, "full"), (3, "full"), (2, "lora"), (3, "lora"), (2, "lora-emb")])
@pytest.mark.parametrize("stack", [OLD, "transformers-5", "qwenfit"])
def test_zero_takes_less_of_each_gpu_the_more_there_are(stage: int, method: str, stack: str) -> None:
    sizes = [make("Qwen-7B", method, stack=stack, gpus=n, zero=stage).memory.process for n in (2, 4, 8, 16)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]


def test_zero_3_takes_less_than_zero_2() -> None:
    for stack in (OLD, "transformers-5", "qwenfit"):
        two, three = (make("Qwen-72B", "lora", stack=stack, gpus=8, zero=z).memory.process for z in (2, 3))
        assert three < two / 2


def test_full_parameter_states_are_never_below_what_deepspeed_says_is_the_least() -> None:
    for model, gpus in product(("Qwen-1.8B", "Qwen-7B", "Qwen-14B"), (1, 2, 4, 8)):
        made = make(model, "full", stack=OLD, gpus=gpus)
        assert made.memory.allocated > states_lower_bound(made.model, Finetune("full"), gpus)


def test_lora_adds_16_bytes_per_adapter_parameter_and_qwenfit_12() -> None:
    for stack, each in (("transformers-5", 16), ("qwenfit", 12)):
        made = make("Qwen-7B", "lora", stack=stack)
        states = made.memory.adapters + made.memory.gradients + made.memory.optimizer
        assert states == each * lora_parameters(made.model, 64)


def test_an_8_bit_optimizer_takes_less_than_fp32_and_bf16_least_of_all() -> None:
    for method in ("full", "lora"):
        fp32, eight, bf16 = (
            make("Qwen-7B", method, optimizer=o, stack="transformers-5").memory.process
            for o in ("fp32", "8bit", "bf16")
        )
        assert bf16 < eight < fp32


def test_checkpointing_and_a_fused_loss_both_save() -> None:
    base = make("Qwen-7B", "lora", seq_len=8192, stack="transformers-5")
    assert make("Qwen-7B", "lora", seq_len=8192, stack="transformers-5", fused_loss=True).memory.logits < 2**30
    assert base.memory.logits > 14e9
    without = make("Qwen-7B", "lora", seq_len=8192, stack="transformers-5", checkpointing=False)
    assert without.memory.process > base.memory.process + 30e9
    assert without.speed.seconds_per_iter is not None and base.speed.seconds_per_iter is not None
    assert without.speed.seconds_per_iter < base.speed.seconds_per_iter


@pytest.mark.parametrize("card", ["A100-SXM4-80GB", "T4", "L40S", "RTX 4080", "RTX 3090", "H100-SXM5-80GB"])
def test_vllm_fills_its_share_of_what_the_driver_leaves(card: str) -> None:
    made = make("Qwen-1.8B", gpu=card, stack="vllm")
    assert made.fits
    assert made.memory.process == pytest.approx(0.9 * find_device(card).usable_bytes, abs=2)
    assert "--gpu-memory-utilization 0.90" in made.command


def test_vllm_does_not_fit_where_its_share_does_not_hold_weights_and_one_cache() -> None:
    card = find_device("RTX 4090")
    share = int(0.9 * card.usable_bytes)
    assert make("Qwen-14B", gpu=card, stack="vllm").verdict == "does not fit"
    most = next(b for b in range(1, 64) if not make("Qwen-7B", gpu=card, stack="vllm", batch=b).fits)
    assert make("Qwen-7B", gpu=card, stack="vllm", batch=most).memory.process > share


def test_the_old_software_counts_the_cache_twice_and_a_paged_one_once() -> None:
    cache = 2048 * 524_288
    assert make("Qwen-7B", stack=OLD, prompt=1, generate=2047).memory.kv_cache == 2 * cache
    assert make("Qwen-7B", stack="qwenfit", prompt=1, generate=2047).memory.kv_cache == cache


def test_only_the_old_software_cannot_run_flash_attention_beside_an_int8_cache() -> None:
    conflict = "switches FlashAttention off"
    for stack in ("qwenfit", "vllm"):
        assert not any(conflict in note for note in make("Qwen-7B", stack=stack, kv_cache="int8").notes)
    assert any(conflict in note for note in make("Qwen-7B", stack=OLD, kv_cache="int8").notes)
    assert not any(conflict in note for note in make("Qwen-7B", stack=OLD).notes)


def test_a_shared_prefix_saves_in_a_paged_cache_and_a_note_says_that_others_have_none() -> None:
    sizes = {"batch": 16, "prompt": 2048, "generate": 128}
    for stack in ("qwenfit", OLD):
        alone, shared = (make("Qwen-7B", stack=stack, shared_prefix=n, **sizes) for n in (0, 2000))
        saved = alone.memory.kv_cache - shared.memory.kv_cache
        assert saved == (15 * 2000 * 524_288 if stack == "qwenfit" else 0)
        assert any("own copy of the shared prefix" in note for note in shared.notes) == (stack == OLD)


@pytest.mark.parametrize("card", ["T4", "V100-SXM2-32GB", "RTX 2080"])
@pytest.mark.parametrize("task", ["inference", "lora"])
def test_a_card_without_bf16_is_planned_in_fp16_and_says_so(card: str, task: str) -> None:
    for asked in (None, "bf16"):
        made = make("Qwen-1.8B", task, gpu=card, precision=asked)
        assert made.precision == "fp16"
        assert any("No bf16" in note and "fp16 is used instead" in note for note in made.notes)
        if task == "inference":
            assert made.task.kv_cache == "fp16"  # type: ignore[union-attr]
    assert not any("No bf16" in note for note in make("Qwen-1.8B", task, gpu="RTX 3090").notes)


def test_a_cpu_is_held_to_its_memory_and_to_one_machine() -> None:
    small, large = (make("Qwen-7B", gpu=f"EPYC 9004 {size}GB") for size in (12, 64))
    assert (small.verdict, large.verdict) == ("does not fit", "fits")
    assert large.memory.reserve == 0 and large.memory.workspace == 0
    for device in ("EPYC 9004 64GB", "Apple M2 Max 64GB"):
        with pytest.raises(UsageError, match="one machine"):
            make("Qwen-7B", gpu=device, gpus=2)


def test_a_mac_gives_its_gpu_a_share_of_the_unified_memory() -> None:
    assert make("Qwen-14B", gpu="Apple M2 Max 32GB").verdict == "does not fit"
    assert make("Qwen-14B", gpu="Apple M2 Max 64GB").capacity == 48 * 2**30


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"task": "lora", "stack": "vllm"}, "does not finetune"),
        ({"task": "qlora", "zero": 3, "gpus": 2}, "cannot shard"),
        ({"task": "lora-emb", "zero": 3, "gpus": 2, "stack": OLD}, "refuses ZeRO-3"),
        ({"task": "full", "optimizer": "bf16", "stack": OLD}, "DeepSpeed keeps float32"),
        ({"task": "lora", "precision": "int4"}, "cannot be trained"),
        ({"task": "lora", "precision": "fp32"}, "16 bits"),
        ({"task": "qlora", "precision": "bf16"}, "not bf16"),
        ({"task": "lora", "parallel": "tensor", "gpus": 2}, "--zero"),
        ({"flash_attention": True, "gpu": "V100-SXM2-32GB"}, "does not run on V100"),
        ({"parallel": "tensor", "gpus": 8}, "does not divide|do not divide|cuts"),
        ({"gpus": 64}, "layers"),
        ({"prompt": 100, "shared_prefix": 101}, "longer than the prompt"),
        ({"context": 32_770}, "32768 tokens"),
        ({"host_factor": 0.0}, "host_factor"),
        ({"host_factor": float("nan")}, "host_factor"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(options: dict[str, object], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        make("Qwen-7B", **({"precision": "int4"} if "parallel" in options and "task" not in options else {}), **options)


def test_several_nodes_are_bound_by_their_network_and_a_faster_one_is_faster() -> None:
    options = {"gpus": 8, "nodes": 2, "zero": 3}
    slow, fast = (make("Qwen-72B", "full", network_gbps=g, **options) for g in (25, 400))
    assert slow.speed.bound == "link"
    assert fast.speed.tokens_per_s > 2 * slow.speed.tokens_per_s
    assert slow.memory == fast.memory


def test_a_card_without_bf16_keeps_an_fp16_cache_in_every_answer() -> None:
    turing = Hardware(find_device("T4"))
    assert {p.task.kv_cache for p in what_fits(turing, Inference())} == {"fp16"}  # type: ignore[union-attr]
    assert make("Qwen-7B", gpu="T4", precision="int4").task.kv_cache == "fp16"  # type: ignore[union-attr]
    moved = replan(make("Qwen-7B", gpu="A100-SXM4-80GB"), hardware=turing)
    assert (moved.precision, moved.task.kv_cache) == ("fp16", "fp16")  # type: ignore[union-attr]
