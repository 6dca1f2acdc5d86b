"""Apple silicon: the chip's name and memory from sysctl; bandwidth and FLOP/s from the catalog."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from dataclasses import replace

from qwenfit.errors import NotFound
from qwenfit.hardware import Device, match_detected


def sysctl(name: str) -> str:
    """The value of one macOS kernel setting."""
    return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, check=True, timeout=5).stdout.strip()


def apple_host(ask: Callable[[str], str] = sysctl, available: int | None = None) -> Device:
    """The unified memory, GPU and CPU of a Mac as one device.

    `free_bytes` is what macOS calls available, at most what it lets the GPU use. Raises NotFound for a chip
    (or an Intel Mac) that the catalog does not have.
    """
    brand, memory = ask("machdep.cpu.brand_string"), int(ask("hw.memsize"))
    known = match_detected(brand, memory)
    if known is None:
        raise NotFound(
            f"The catalog has no {brand!r} ({platform.machine()}) with {memory / 1024**3:.0f} GiB.",
            "qwenfit plan --gpu NAME",
        )
    if available is None:
        import psutil  # type: ignore[import-untyped, unused-ignore]

        available = int(psutil.virtual_memory().available)
    free = min(available, known.visible_bytes or memory)
    return replace(known, memory_bytes=memory, free_bytes=free, detected=True)
