"""What this project's trainer takes on CPUs, where torch's own operations run one after the other, unfused."""

from __future__ import annotations

from qwenfit.config import ModelConfig
from qwenfit.hardware import Device
from qwenfit.planning.constants import measured
from qwenfit.planning.device_speed import matmul_flops
from qwenfit.planning.finetune_qwenfit import traffic_bytes
from qwenfit.planning.task import Finetune

AVX512_WITHOUT_BF16 = ("skylake-sp", "icelake-sp")  # a catalog row names no flags


def cpu_seconds(
    config: ModelConfig, task: Finetune, device: Device, precision: str, flops: float
) -> tuple[float, float, float]:
    """Seconds of (products, work between them, random numbers) in a micro-batch of `flops`: they add up."""
    bandwidth = device.bandwidth * measured("qwenfit_cpu_train_traffic")
    width = 2 if precision == "fp32" else 1
    return (
        flops / product_flops(device, precision),
        width * traffic_bytes(config, task) / bandwidth,
        dropped_elements(config, task) * measured("qwenfit_cpu_draw"),
    )


def update_seconds(task: Finetune, device: Device, parameters: int) -> float:
    """An optimizer step of `parameters`: unfused too, and a number is drawn for each value that is rounded at random.

    Those are the second moment, and the weight where no float32 one is kept.
    """
    touched, drawn = {"fp32": (40, 1), "bf16": (100, 2), "8bit": (100, 1)}[task.optimizer]
    bandwidth = device.bandwidth * measured("qwenfit_cpu_train_traffic")
    return parameters * (touched / bandwidth + drawn * measured("qwenfit_cpu_draw"))


def product_flops(device: Device, precision: str) -> float:
    """FLOP/s that a step's products reach. All but fp32 multiply in bf16: int8 and int4 weights are made dense first.

    They are torch's own: without gradients other kernels of this project multiply bf16 where a CPU has no instructions
    for it. OneDNN's widen to float32 there with AVX-512; without, a plain loop runs.
    """
    share = measured("qwenfit_cpu_train_share")
    if precision != "fp32" and device.bf16:
        return matmul_flops(device, "bf16") * (measured("qwenfit_cpu_train_tiles") if device.tensor_cores else share)
    if precision == "fp32" or "avx512f" in device.features or device.architecture in AVX512_WITHOUT_BF16:
        return matmul_flops(device, "fp32") * share
    return device.flops["fp32"] * measured("qwenfit_cpu_wide_train")


def dropped_elements(config: ModelConfig, task: Finetune) -> int:
    """Numbers that dropout draws: the inputs of the four adapted products of a layer, again where it runs twice."""
    if task.method == "full":
        return 0
    inputs = 2 * config.hidden_size + config.q_size + config.intermediate_size
    return task.tokens * config.num_layers * inputs * (2 if task.checkpointing else 1)
