"""The CPUs of this host: model, instruction sets, the cores and the memory that this process may use."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from qwenfit.catalog import read_csv
from qwenfit.detect.cgroup import read_limits
from qwenfit.hardware import Device, cpu_device

# Flags of /proc/cpuinfo that decide which kernel runs; the second row is Arm's.
FEATURES = (
    *("avx2", "f16c", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni"),
    *("amx_tile", "amx_int8", "amx_bf16", "asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)

# What a guest with few cores reads of its socket's bandwidth, for each core with all of them reading. Measured in four
# guests: 20 GB/s a core (Zen 5, 2 cores), 16.5 (Zen 4, 2), 8.5 (Zen 3, 2), 5.8 (Emerald Rapids, 16). An estimate is
# within a factor of two of those; `measure_bandwidth` says better.
CORE_BANDWIDTH = 10e9

# The platform assumed for a CPU that the catalog does not know: the slowest of those with instructions that it has.
WITH_INSTRUCTIONS = (
    ("amx_bf16", "Xeon Sapphire Rapids"),
    ("avx512_bf16", "Ryzen 7000/9000"),
    ("avx512_vnni", "Xeon Ice Lake"),
)
DEFAULT_PLATFORM = "Desktop DDR4-3200"


@dataclass(frozen=True)
class CpuInfo:
    """/proc/cpuinfo, and the cores that the affinity of this process leaves."""

    model: str
    vendor_id: str
    family: int
    model_number: int
    flags: frozenset[str]
    cores: int  # physical cores, hyper-threads counted once


def cpu_host(root: Path = Path("/"), affinity: Collection[int] | None = None) -> Device:
    """The CPUs and RAM of this host as one device.

    `units` is the cores left by affinity and cgroup quota; `memory_bytes` is RAM or the cgroup limit, the smaller;
    `free_bytes` is the least of what the kernel calls available and what the cgroups leave. Bandwidth is an estimate:
    that of the platform (cpus.csv) or CORE_BANDWIDTH for each core, the smaller. FLOP/s take the platform's clock.
    """
    info = read_cpuinfo(root, affinity)
    limits = read_limits(root)
    total, available = _memory(root)
    cores = min(info.cores, limits.cpus or info.cores)
    known, row = _platform(info)
    assumed = "" if known else " (assumed for a CPU that is in no list, by its instructions)"
    memory = min(total, limits.memory or total)
    device = cpu_device(row, cores, memory)
    return replace(
        device,
        name=info.model,
        architecture=row["architecture"] if known else platform.machine(),
        bandwidth=min(device.bandwidth, cores * CORE_BANDWIDTH),
        flops=_supported(device.flops, info.flags),
        tensor_cores="amx_bf16" in info.flags,
        source=f"{row['name']}{assumed}: {row['source']}; at most {CORE_BANDWIDTH / 1e9:.0f} GB/s a core",
        free_bytes=min(available, memory if limits.memory_free is None else limits.memory_free),
        detected=True,
        bandwidth_estimated=True,
        features=tuple(flag for flag in FEATURES if flag in info.flags),
    )


def read_cpuinfo(root: Path = Path("/"), affinity: Collection[int] | None = None) -> CpuInfo:
    """The first processor's model and flags, and the physical cores among the allowed processors."""
    processors = _processors(root)
    first = processors[0] if processors else {}
    allowed = set(allowed_processors() if affinity is None else affinity)
    cores = set()
    for number, fields in enumerate(processors):
        index = int(fields.get("processor", number))
        if index in allowed:
            cores.add((fields.get("physical id", ""), fields.get("core id", f"cpu{index}")))
    flags = first.get("flags") or first.get("Features") or ""
    return CpuInfo(
        model=first.get("model name") or platform.processor() or platform.machine(),
        vendor_id=first.get("vendor_id", ""),
        family=_int(first.get("cpu family")),
        model_number=_int(first.get("model")),
        flags=frozenset(flags.split()),
        cores=len(cores) or len(allowed),
    )


def allowed_processors() -> Collection[int]:
    """The processors of all threads of this process: OpenMP pins each of its own, the main one too, to one."""
    if not hasattr(os, "sched_getaffinity"):
        return range(os.cpu_count() or 1)
    allowed = set(os.sched_getaffinity(0))
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:
        return allowed
    for thread in threads:
        with suppress(OSError):  # it has ended
            allowed |= os.sched_getaffinity(int(thread))
    return allowed


def _processors(root: Path) -> list[dict[str, str]]:
    try:
        text = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    blocks = []
    for block in re.split(r"\n\s*\n", text):
        pairs = (line.partition(":") for line in block.splitlines())
        fields = {key.strip(): value.strip() for key, colon, value in pairs if colon}
        if "processor" in fields:
            blocks.append(fields)
    return blocks


def _platform(info: CpuInfo) -> tuple[bool, dict[str, str]]:
    """The row of cpus.csv for a vendor, family and model number, or (False) one with the CPU's instructions."""
    for row in read_csv("cpus.csv"):
        if row["vendor_id"] != info.vendor_id or not info.vendor_id:
            continue
        for family, models in zip(row["family"].split(";"), _per_family(row), strict=True):
            if int(family) == info.family and any(low <= info.model_number <= high for low, high in models):
                return True, row
    name = next((name for flag, name in WITH_INSTRUCTIONS if flag in info.flags), DEFAULT_PLATFORM)
    return False, next(row for row in read_csv("cpus.csv") if row["name"] == name)


def _per_family(row: dict[str, str]) -> list[list[tuple[int, int]]]:
    """Model ranges for each family of a row: "25;26" with "97-97;64-79" pairs up, one family has all the ranges."""
    ranges = [(int(low), int(high)) for low, high in (text.split("-") for text in row["models"].split(";"))]
    families = row["family"].split(";")
    return [ranges] if len(families) == 1 else [[pair] for pair in ranges]


def _supported(flops: dict[str, float], flags: frozenset[str]) -> dict[str, float]:
    """The platform's FLOP/s without the paths whose instructions the guest does not see."""
    needs = {
        "bf16": {"avx512_bf16", "amx_bf16", "bf16"},
        "int8": {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"},
    }
    found = {dtype: peak for dtype, peak in flops.items() if dtype not in needs or needs[dtype] & flags}
    for dtype, tiles, times in (("bf16", "amx_bf16", 2), ("int8", "amx_int8", 4)):
        if dtype in found and tiles not in flags:  # vectors multiply so many in the place of one float32
            found[dtype] = min(found[dtype], times * found["fp32"])
    return found


def _memory(root: Path) -> tuple[int, int]:
    """(total, available) bytes of RAM."""
    try:
        text = (root / "proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        import psutil  # type: ignore[import-untyped, unused-ignore]

        memory = psutil.virtual_memory()
        return int(memory.total), int(memory.available)
    kib = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines() if len(line.split()) > 1}
    return kib["MemTotal"] * 1024, kib.get("MemAvailable", kib["MemFree"]) * 1024


def _int(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else -1
