"""What this machine has: NVIDIA GPUs through NVML, the CPUs with their memory, Apple's unified memory.

`detect_hardware()` asks anew on every call: free memory changes. Nothing heavy is imported; without a GPU driver it
takes a few milliseconds. Memory bandwidth of a CPU is a figure of its class until `measure_bandwidth()` is asked for.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qwenfit.detect.bandwidth import measure_bandwidth
from qwenfit.detect.cgroup import Limits, read_limits
from qwenfit.detect.cpu import cpu_host
from qwenfit.detect.nvidia import nvidia_devices
from qwenfit.hardware import Device

__all__ = ["Limits", "cpu_host", "detect_hardware", "measure_bandwidth", "nvidia_devices", "read_limits"]


def detect_hardware(root: Path = Path("/")) -> list[Device]:
    """This machine's devices: NVIDIA GPUs in CUDA's order, then the host (CPUs, or Apple's CPU and GPU in one).

    `root` is where /proc and /sys are read. Raises QwenfitError when an NVIDIA driver is there but does not work.
    """
    if sys.platform == "darwin":
        from qwenfit.detect.apple import apple_host

        return [apple_host()]
    return [*nvidia_devices(), cpu_host(root)]
