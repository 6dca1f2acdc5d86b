"""Kernels of qwenfit/kernels/hopper compiled for a CPU, a Hopper's instructions emulated by emulated_hopper.h."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from qwenfit.kernels.hopper import instructions


class Map(ctypes.Structure):
    """What the driver's tensor map says of a matrix."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("columns", ctypes.c_longlong),
        ("rows", ctypes.c_longlong),
        ("stride", ctypes.c_longlong),
        ("box_rows", ctypes.c_int),
    )


def emulated(folder: Path, source: str, main: str, *products: str) -> ctypes.CDLL:
    """A kernel's source, whose `products` are functions of `instructions`, with an entry for Python."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    stand_in = Path(__file__).with_name("emulated_hopper.h").read_text()
    for real, other in ((instructions.text("primitives.cuh"), stand_in), *((product, "") for product in products)):
        assert real in source
        source = source.replace(real, other)
    source += main
    path = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        written = path.with_suffix(".cc")
        written.write_text(source)
        command = ["g++", "-std=c++20", "-O2", "-w", "-fPIC", "-shared", "-pthread", str(written), "-o", str(path)]
        subprocess.run(command, check=True)
    return ctypes.CDLL(str(path))
