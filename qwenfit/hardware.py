"""Hardware: what this machine has, or what a named card has. Standard library only; NVML and psutil on detection."""

from __future__ import annotations

from dataclasses import dataclass


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
    flops: dict[str, float]  # dense tensor-core peak by data type: "fp32", "fp16", "bf16", "int8"; absent = no such path
    link_bandwidth: float | None  # GPU-to-GPU, bytes/s one direction, when several sit in one host
    link: str  # "NVLink 3", "PCIe 4.0 x16", ...
    source: str
    free_bytes: int | None = None  # detected devices: free now
    detected: bool = False

    @property
    def usable_bytes(self) -> int:
        """Memory a plan may count on: what is free now on a detected device, else all that is sold."""
        return self.memory_bytes if self.free_bytes is None else self.free_bytes

    @property
    def bf16(self) -> bool:
        return "bf16" in self.flops


@dataclass(frozen=True)
class Hardware:
    """Equal devices in equal hosts: `gpus` devices on each of `nodes` hosts, joined by `network_bandwidth` (bytes/s)."""

    device: Device
    gpus: int = 1  # per node
    nodes: int = 1
    network_bandwidth: float | None = None

    @property
    def world_size(self) -> int:
        return self.gpus * self.nodes
