"""Kernels are compiled side by side for a card that is not there: a driver that knows only what a Hopper is."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from qwenfit.kernels.triton import launch

SCRIPT = """
import threading

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class Hopper:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


driver.set_active(Hopper())
torch.cuda.get_device_capability = lambda *_: (9, 0)

from qwenfit.kernels.triton.gate import silu_mul
from qwenfit.kernels.triton.launch import FUSED_SUMS, compile_side_by_side, compiled_instead


@triton.jit
def broken(x_ptr):
    there_is_no_such_name(x_ptr)


launched, compiled = [], []
CompiledKernel.run = property(lambda kernel: lambda *_: launched.append(kernel.name))
CompiledKernel.launch_metadata = lambda *_: None
CompiledKernel._init_handles = lambda *_: None
CompiledKernel.function = 0
triton.knobs.compilation.listener = lambda **given: compiled.append(given["src"].name)
x, before = torch.randn(4, 64, dtype=torch.bfloat16), JITFunction.run


by = []


def launch():
    broken[(1,)](x, **FUSED_SUMS)
    for _ in range(3):
        assert compiled_instead("the same", lambda: by.append(threading.get_ident()))
    assert compiled_instead("fails", lambda: 1 / 0)
    for _ in range(3):
        silu_mul(x)
        silu_mul(x.half())
    raise RuntimeError("of something else")


def beside():
    # Another thread's launch meanwhile is none of ours.
    other = threading.Thread(target=silu_mul, args=(torch.randn(4, 128, dtype=torch.bfloat16),))
    other.start()
    other.join()


compile_side_by_side(beside)
assert launched == ["_silu_mul"], launched
many = [torch.randn(4, 32 * n, dtype=torch.bfloat16) for n in range(4, 12)]


def interrupted():
    for each in many:
        silu_mul(each)
    raise KeyboardInterrupt


try:
    compile_side_by_side(interrupted)
except KeyboardInterrupt:
    print("interrupted")
launched.clear()
silu_mul(many[-1])
assert launched == ["_silu_mul"] and JITFunction.run is before  # what it had not come to is compiled now
launched.clear(), compiled.clear()
compile_side_by_side(launch)
assert not launched and JITFunction.run is before
assert len(by) == 1 and by != [threading.get_ident()]  # what is not Triton's: once, elsewhere, and waited for
assert not compiled_instead("later", by.clear)
assert sorted(compiled) == ["_silu_mul", "_silu_mul"], compiled
silu_mul(x), silu_mul(x.half())
assert len(compiled) == 2 and launched == ["_silu_mul", "_silu_mul"], (compiled, launched)
try:
    broken[(1,)](x, **FUSED_SUMS)
except Exception as error:
    print("told:", type(error).__name__)
"""


def test_kernels_are_compiled_side_by_side_and_not_run(tmp_path: Path) -> None:
    """What cannot be compiled is told of where it is launched, and not before."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(script)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["interrupted", "told:", "CompilationError"]
    assert "Warning" not in done.stderr  # Triton 3.9 warns of what it has to choose itself


def test_every_launch_says_what_versions_of_triton_choose_differently() -> None:
    """By FUSED_SUMS, or by what holds it."""
    launches = 0
    for path in sorted(Path(launch.__file__).parent.glob("*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript):
                name = ast.unparse(call.func.value)
                if name.startswith("_") and "." not in name:
                    spread = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None]
                    said = ("FUSED_SUMS", "options(", "shared", "constants")
                    assert any(word in each for each in spread for word in said), f"{path.name}:{call.lineno}"
                    launches += 1
    assert launches > 30
