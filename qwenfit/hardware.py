"""Hardware: what a named device has. What this machine has is in `qwenfit.detect`. Standard library only.

The figures are rows of catalog/gpus.csv and catalog/cpus.csv, each with its source. Their units:
- memory_gib is the size sold, for Apple a list of sizes. A vendor's "24 GB" card holds 24 GiB (25,769,803,776 bytes).
- visible_mib, where a public log shows it, is what the driver leaves to programs (torch's `total_memory`), in MiB.
- bandwidth_gb_s and link_gb_s are peaks in 10^9 bytes/s; the link counts one direction, and a GeForce is taken without
  an NVLink bridge.
- *_tflops and int8_tops are dense peaks in 10^12 operations/s, fp16 accumulated in fp32; fp32 is that of the plain
  cores. An empty cell says that the device has no such path.
- units are streaming multiprocessors, compute units or GPU cores.
- price_usd is the list price at launch, where one was announced.
A CPU row gives channels x MT/s x 8 bytes, and cores x clock x operations a cycle; its memory is named with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from qwenfit.errors import NotFound, UsageError, nearest

GIB = 1024**3


@dataclass(frozen=True)
class Device:
    """One accelerator (or the CPUs of one host) and what it can do. Bytes, bytes/s and FLOP/s throughout."""

    name: str
    kind: str  # "gpu" | "npu" | "cpu" | "unified" (Apple: CPU and GPU share memory)
    vendor: str  # "nvidia" | "amd" | "intel" | "huawei" | "hygon" | "apple" | "cpu"
    architecture: str  # "ampere", "gfx942", "zen4", ...
    compute_capability: tuple[int, int] | None  # NVIDIA only
    memory_bytes: int  # what the vendor sells; total memory for a CPU host
    bandwidth: float  # peak memory bandwidth, bytes/s
    flops: dict[str, float]  # dense peak by data type: "fp32", "fp16", "bf16", "int8"; absent = no such path
    link_bandwidth: float | None  # GPU-to-GPU, bytes/s one direction, when several sit in one host
    link: str  # "NVLink 3", "PCIe 4.0 x16", ...
    source: str
    free_bytes: int | None = None  # detected devices: free now
    detected: bool = False
    visible_bytes: int | None = None  # what the driver leaves to programs, where known
    units: float = 0  # streaming multiprocessors, compute units, GPU cores; CPU cores (a quota may give a fraction)
    tensor_cores: bool = True  # has matrix units (on a CPU: AMX)
    price_usd: float | None = None  # list price at launch
    bandwidth_estimated: bool = False  # detected, and `bandwidth` is a figure of the class, not a measurement
    features: tuple[str, ...] = ()  # CPU flags that decide kernels: "avx2", "avx512_bf16", "amx_int8", ...

    @property
    def usable_bytes(self) -> int:
        """Memory a plan may count on: what is free now on a detected device, else what the driver leaves, else all."""
        if self.free_bytes is not None:
            return self.free_bytes
        return self.memory_bytes if self.visible_bytes is None else self.visible_bytes

    @property
    def bf16(self) -> bool:
        return "bf16" in self.flops

    @property
    def flash_attention(self) -> int:
        """The newest FlashAttention of the flash-attn package that runs here: 2, 1 or 0 (none).

        Version 2 needs Ampere or newer (or AMD's CDNA); version 1 runs on Turing's tensor cores too
        (Dao-AILab/flash-attention README). That is the guide's "Turing or Ampere on".
        """
        if self.vendor == "amd":
            return 2 if self.architecture.startswith("gfx9") else 0
        if self.compute_capability is None or not self.tensor_cores:
            return 0
        return 2 if self.compute_capability >= (8, 0) else 1 if self.compute_capability >= (7, 5) else 0


@dataclass(frozen=True)
class Hardware:
    """`gpus` equal devices on each of `nodes` equal hosts, joined by `network_bandwidth` (bytes/s)."""

    device: Device
    gpus: int = 1  # per node
    nodes: int = 1
    network_bandwidth: float | None = None

    @property
    def world_size(self) -> int:
        return self.gpus * self.nodes


def capability_notes(device: Device) -> list[str]:
    """What the device cannot do and what follows for a plan, one sentence each; empty when nothing is missing."""
    if device.kind == "cpu":
        return _cpu_notes(device)
    generation = device.architecture.capitalize() if device.vendor == "nvidia" else device.name
    notes = []
    if not device.bf16:
        why = "bf16 starts with Ampere" if device.vendor == "nvidia" else "its hardware lacks it"
        notes.append(f"No bf16 on {generation} ({why}): fp16 is used instead, and training needs loss scaling.")
    if not device.tensor_cores:
        notes.append(f"{device.name} has no tensor cores: matrix products run at the rate of its plain cores.")
    if "int8" not in device.flops:
        notes.append(f"No int8 matrix path on {device.name}: int8 weights save memory but are computed in 16 bits.")
    if device.flash_attention < 2:
        notes.append(_flash_note(device))
    return notes


def _flash_note(device: Device) -> str:
    if device.flash_attention == 1:
        return f"FlashAttention 2 needs Ampere or newer: {device.name} runs FlashAttention 1 or PyTorch's own."
    return f"FlashAttention does not run on {device.name}: PyTorch's own attention is used."


def _cpu_notes(device: Device) -> list[str]:
    notes = []
    if not device.bf16:
        notes.append(f"No bf16 instructions on {device.name}: bf16 weights are widened to fp32 before each product.")
    if "int8" not in device.flops:
        notes.append(f"No 8-bit dot product (VNNI) on {device.name}: int8 and int4 save bandwidth, not arithmetic.")
    return notes


def all_devices() -> tuple[Device, ...]:
    """Every accelerator of the catalog; an Apple chip once for each memory size it is sold with."""
    return tuple({device.name: device for devices in _index().values() for device in devices}.values())


def cost_key(device: Device) -> tuple[bool, float, float]:
    """Sorts devices cheapest first: by list price where there is one, then those without by memory and bandwidth."""
    if device.price_usd is not None:
        return (False, device.price_usd, device.bandwidth)
    return (True, device.memory_bytes, device.bandwidth)


def cpu_names() -> list[str]:
    """The CPU platforms that `find_device` knows when a memory size follows the name: "EPYC 9004 256GB"."""
    from qwenfit.catalog import read_csv

    return [row["name"] for row in read_csv("cpus.csv")]


def find_device(name: str) -> Device:
    """The device of a name as people write it: "3090", "a100-80g", "NVIDIA H100 80GB HBM3", "EPYC 9004 256GB".

    Case, punctuation and the maker's name do not matter. Where a name fits several boards of one memory size the SXM
    one is meant ("H100"); a memory size is never guessed. Raises NotFound with the nearest names, and UsageError when
    the name fits several memory sizes ("A100", "Apple M2 Max") or is a CPU platform without its memory.
    """
    base, form, gib = _split(name)
    same = _index().get(base, ())
    found = _narrow(same, form, gib)
    if not same:
        cpu = _find_cpu(name, base, gib)
        if cpu is not None:
            return cpu
    if not found:
        near = [device.name for device in same] or _nearest_names(base)
        hint = f"Did you mean {', '.join(near)}?" if near else "Names look like 'RTX 3090' or A100-SXM4-80GB."
        raise NotFound(f"The catalog has no device named {name!r}.", hint)
    if len({device.memory_bytes for device in found}) > 1:
        names = ", ".join(device.name for device in found)
        raise UsageError(f"{name!r} fits devices with different memory.", f"Name one of: {names}.")
    return next((device for device in found if "SXM" in device.name), found[0])


def match_detected(name: str, memory_bytes: int) -> Device | None:
    """The catalog row of a card by the name its driver gives and the memory it reports (within 10 %), or None."""
    base, form, _ = _split(name)
    close = [device for device in _index().get(base, ()) if abs(memory_bytes / device.memory_bytes - 1) < 0.10]
    close = [device for device in close if not form or form in _split(device.name)[1]] or close
    return close[0] if close else None


_MAKERS = re.compile(r"nvidia|geforce|tesla|amd|instinct|huawei|hygon|intel|\(r\)|\(tm\)|graphics")
_MEMORY = re.compile(r"(?<![a-z0-9.])(\d+)\s*g(?:i?b)?(?![a-z0-9])")
_FORM = re.compile(r"sxm\d?|pcie|hbm\d?e?")


def _split(name: str) -> tuple[str, str, int | None]:
    """("a100", "sxm4", 80) of "A100-SXM4-80GB": bare name, form factor and memory in GiB, as far as given."""
    text = _MAKERS.sub(" ", name.lower())
    memory = _MEMORY.search(text)
    text = _MEMORY.sub(" ", text)
    form = _FORM.search(text)
    base = re.sub(r"[^a-z0-9]", "", _FORM.sub(" ", text))
    # The driver calls the SXM H100 "80GB HBM3".
    found = "" if form is None else "sxm" if form[0].startswith("hbm") else form[0]
    return base, found, int(memory[1]) if memory else None


@cache
def _index() -> dict[str, tuple[Device, ...]]:
    """Devices by bare name: their own, without "RTX", "GTX", "Apple" or "Arc", and the aliases of their row."""
    from qwenfit.catalog import read_csv

    found: dict[str, tuple[Device, ...]] = {}
    for row in read_csv("gpus.csv"):
        devices = tuple(_gpu(row, size) for size in row["memory_gib"].split(";"))
        base = _split(row["name"])[0]
        for key in {base, re.sub(r"^(rtx|gtx|apple|arc)", "", base), *filter(None, row["aliases"].split(";"))}:
            found[key] = (*found.get(key, ()), *devices)
    return found


def _narrow(devices: Sequence[Device], form: str, gib: int | None) -> Sequence[Device]:
    if gib is not None:
        devices = [device for device in devices if device.memory_bytes == gib * GIB]
    if form:
        devices = [device for device in devices if _split(device.name)[1].startswith(form)]
    return devices


def _nearest_names(base: str) -> list[str]:
    """The devices and CPU platforms whose bare names are closest to `base`."""
    names = {key: devices[0].name for key, devices in _index().items()} | {_split(cpu)[0]: cpu for cpu in cpu_names()}
    return list(dict.fromkeys(names[key] for key in nearest(base, list(names), 4)))


def _gpu(row: dict[str, str], size: str) -> Device:
    several = ";" in row["memory_gib"] or row["kind"] == "unified"
    memory = int(size) * GIB
    capability = row["compute_capability"]
    return Device(
        name=f"{row['name']} {size}GB" if several else row["name"],
        kind=row["kind"],
        vendor=row["vendor"],
        architecture=row["architecture"],
        compute_capability=_capability(capability) if capability else None,
        memory_bytes=memory,
        bandwidth=float(row["bandwidth_gb_s"]) * 1e9,
        flops=_flops(row),
        link_bandwidth=float(row["link_gb_s"]) * 1e9 if row["link_gb_s"] else None,
        link=row["link"],
        source=row["source"],
        visible_bytes=int(row["visible_mib"]) * 1024**2 if row["visible_mib"] else _unified_share(row["kind"], memory),
        units=int(row["units"]),
        tensor_cores=row["tensor_cores"] == "yes",
        price_usd=float(row["price_usd"]) if row["price_usd"] else None,
    )


def _unified_share(kind: str, memory: int) -> int | None:
    """What macOS lets a GPU use of unified memory by default: two thirds, from 36 GiB on three quarters.

    The `recommendedMaxWorkingSetSize` that Metal reports: 10.7 of 16, 27 of 36, 48 of 64 GiB (llama.cpp logs).
    """
    if kind != "unified":
        return None
    return memory * 3 // 4 if memory >= 36 * GIB else memory * 2 // 3


def _capability(text: str) -> tuple[int, int]:
    major, minor = text.split(".")
    return int(major), int(minor)


def _flops(row: dict[str, str]) -> dict[str, float]:
    columns = {"fp32": "fp32_tflops", "fp16": "fp16_tflops", "bf16": "bf16_tflops", "int8": "int8_tops"}
    return {dtype: round(float(row[column]) * 1e3) * 1e9 for dtype, column in columns.items() if row[column]}


def _find_cpu(name: str, base: str, gib: int | None) -> Device | None:
    from qwenfit.catalog import read_csv

    for row in read_csv("cpus.csv"):
        if base == _split(row["name"])[0] or base in row["aliases"].split(";"):
            if gib is None:
                hint = f'Name it too: "{row["name"]} 64GB".'
                raise UsageError(f"{name!r} is a CPU platform without its memory.", hint)
            return cpu_device(row, float(row["cores"]), gib * GIB)
    return None


def cpu_device(row: dict[str, str], cores: float, memory_bytes: int) -> Device:
    """The CPUs of one host after a row of cpus.csv, with `cores` of them and `memory_bytes` of RAM.

    Bandwidth is channels x MT/s x 8 bytes of one socket; FLOP/s is cores x clock x operations a cycle.
    """
    columns = {"fp32": "fp32_per_cycle", "bf16": "bf16_per_cycle", "int8": "int8_per_cycle"}
    clock = float(row["ghz"]) * 1e9
    return Device(
        name=row["name"],
        kind="cpu",
        vendor="cpu",
        architecture=row["architecture"],
        compute_capability=None,
        memory_bytes=memory_bytes,
        bandwidth=int(row["channels"]) * int(row["mt_s"]) * 1e6 * 8,
        flops={dtype: cores * clock * int(row[column]) for dtype, column in columns.items() if row[column]},
        link_bandwidth=None,
        link="none",
        source=row["source"],
        units=cores,
        tensor_cores=int(row["bf16_per_cycle"] or 0) >= 1024,
    )


def with_bandwidth(device: Device, bandwidth: float) -> Device:
    """The same device with a measured memory bandwidth (bytes/s) in place of the estimate."""
    return replace(device, bandwidth=bandwidth, bandwidth_estimated=False)
