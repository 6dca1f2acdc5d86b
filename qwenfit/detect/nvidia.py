"""NVIDIA GPUs through NVML: name, memory total and free, compute capability; bandwidth and FLOP/s from the catalog.

A card that the catalog does not have gets them from what NVML says: memory clock x bus width x 2 (two transfers a
clock), and cores x clock x the rate of its architecture. Those are peaks at the highest clocks.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

from qwenfit.errors import QwenfitError
from qwenfit.hardware import Device, match_detected

# Compute capability -> architecture, plain cores per SM, fp16 and int8 tensor operations per SM and clock with the full
# rate of data-centre boards (the whitepapers' tables). GeForce boards accumulate fp16 in fp32 at half of it.
_RATES: dict[tuple[int, int], tuple[str, int, int, int]] = {
    (6, 0): ("pascal", 64, 0, 0),
    (6, 1): ("pascal", 128, 0, 0),
    (7, 0): ("volta", 64, 1024, 0),
    (7, 5): ("turing", 64, 1024, 2048),
    (8, 0): ("ampere", 64, 2048, 4096),
    (8, 6): ("ampere", 128, 1024, 2048),
    (8, 7): ("ampere", 128, 1024, 2048),
    (8, 9): ("ada", 128, 1024, 2048),
    (9, 0): ("hopper", 128, 4096, 8192),
    (10, 0): ("blackwell", 128, 8192, 16384),
    (12, 0): ("blackwell", 128, 1024, 2048),
}


def nvidia_devices(nvml: ModuleType | None = None, environ: dict[str, str] | None = None) -> list[Device]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; empty without a driver.

    Numbers count in NVML's order (by PCI bus), which is CUDA's with CUDA_DEVICE_ORDER=PCI_BUS_ID or equal cards.
    Raises QwenfitError when the driver is installed but fails.
    """
    if nvml is None:
        nvml = _load()
    if nvml is None:
        return []
    try:
        nvml.nvmlInit()
    except (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded):
        return []
    except nvml.NVMLError as error:
        raise QwenfitError(f"The NVIDIA driver does not answer: {error}.", "nvidia-smi") from None
    try:
        return [_device(nvml, handle) for handle in _visible(nvml, os.environ if environ is None else environ)]
    except nvml.NVMLError as error:
        raise QwenfitError(f"The NVIDIA driver does not answer: {error}.", "nvidia-smi") from None
    finally:
        nvml.nvmlShutdown()


def _load() -> ModuleType | None:
    """pynvml, imported only where the driver's library exists: the import alone costs tens of milliseconds."""
    library = "nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1"
    try:
        ctypes.CDLL(library)
    except OSError:
        return None
    import pynvml  # type: ignore[import-untyped, unused-ignore]

    return pynvml  # type: ignore[no-any-return, unused-ignore]


def _visible(nvml: ModuleType, environ: Any) -> list[Any]:
    """NVML handles after CUDA_VISIBLE_DEVICES: numbers or UUIDs, of which a beginning is enough.

    As in CUDA the list ends at its first entry that names no device.
    """
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return handles
    uuids = [nvml.nvmlDeviceGetUUID(handle) for handle in handles]
    chosen: list[int] = []
    for entry in map(str.strip, wanted.split(",")):
        if entry.startswith("MIG-"):
            raise QwenfitError("CUDA_VISIBLE_DEVICES names a MIG slice, not a card.", "qwenfit plan --gpu NAME")
        if entry.isdecimal() and int(entry) < len(handles):
            chosen.append(int(entry))
            continue
        matches = [index for index, uuid in enumerate(uuids) if entry.startswith("GPU-") and uuid.startswith(entry)]
        if len(matches) != 1:
            break
        chosen.append(matches[0])
    return [handles[index] for index in chosen]


def _device(nvml: ModuleType, handle: Any) -> Device:
    name = str(nvml.nvmlDeviceGetName(handle))
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    total, free = int(memory.total), int(memory.free)
    known = match_detected(name, total)
    if known is None:
        return _unknown(nvml, handle, name, total, free)
    return replace(known, memory_bytes=total, free_bytes=free, visible_bytes=None, detected=True)


def _unknown(nvml: ModuleType, handle: Any, name: str, total: int, free: int) -> Device:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    capability = (int(major), int(minor))
    architecture = _RATES[capability][0] if capability in _RATES else f"sm_{major}{minor}"
    memory_clock = _ask(nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM))
    bus_width = _ask(nvml, lambda: nvml.nvmlDeviceGetMemoryBusWidth(handle))
    if not memory_clock or not bus_width:
        raise QwenfitError(
            f"The catalog has no card {name!r} of this size and NVML does not say its memory bandwidth.",
            "qwenfit plan --gpu NAME",
        )
    cores = _ask(nvml, lambda: nvml.nvmlDeviceGetNumGpuCores(handle))
    clock = _ask(nvml, lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM))
    flops, units = _peak_flops(name, capability, cores, clock * 1e6)
    return Device(
        name=name,
        kind="gpu",
        vendor="nvidia",
        architecture=architecture,
        compute_capability=capability,
        memory_bytes=total,
        bandwidth=memory_clock * 1e6 * 2 * bus_width / 8,
        flops=flops,
        link_bandwidth=None,
        link="unknown",
        source="NVML: memory clock x bus width x 2; cores x clock x the architecture's rate",
        free_bytes=free,
        detected=True,
        units=units,
        tensor_cores="int8" in flops or capability == (7, 0),
        bandwidth_estimated=True,
    )


def _peak_flops(name: str, capability: tuple[int, int], cores: int, clock: float) -> tuple[dict[str, float], int]:
    """Dense FLOP/s by data type at `clock` (Hz), and the SMs; a newer architecture has the last known rates."""
    known = max((known for known in _RATES if known <= capability), default=min(_RATES))
    _, cores_per_sm, fp16_rate, int8_rate = _RATES[known]
    units = cores // cores_per_sm
    flops = {"fp32": cores * 2 * clock}
    if "GTX" in name or not fp16_rate:  # Pascal, and the Turing boards without tensor cores
        half_is_fast = capability in {(6, 0), (7, 5)}
        return {**flops, "fp16": flops["fp32"] * (2 if half_is_fast else 1 / 64)}, units
    flops["fp16"] = units * fp16_rate * clock * (0.5 if "GeForce" in name else 1)
    if capability >= (8, 0):
        flops["bf16"] = flops["fp16"]
    if int8_rate:
        flops["int8"] = units * int8_rate * clock
    return flops, units


def _ask(nvml: ModuleType, question: Callable[[], Any]) -> int:
    """The answer, or 0 where this card or driver does not support the question."""
    try:
        return int(question())
    except nvml.NVMLError:
        return 0
