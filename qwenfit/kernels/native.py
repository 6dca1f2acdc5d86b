"""The C kernels of gemv.c, gemm.c and tiles.c: compiled once for this CPU by the system's compiler, used by ctypes.

Nothing depends on them: without a compiler the same products go through torch, and `why_not()` says what is missing.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

GEMV_ROWS = 4  # most rows of x that the matrix-vector kernels take
ROWS = 16  # output rows interleaved in the packed layout
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # activations the kernels read and write

_FLAGS = ["-std=c11", "-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-fPIC"]


class Weight(ctypes.Structure):
    """The struct Packed of packed.h. The tensors behind the pointers must outlive it."""

    _fields_ = [
        ("words", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zeros", ctypes.c_void_p),
        ("out_features", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
    ]


def available() -> bool:
    return not why_not()


def why_not() -> str:
    """Why the kernels are missing, with the command that helps; empty when they are there."""
    return next((loaded for loaded in (_load("gemv.c"), _load("gemm.c")) if isinstance(loaded, str)), "")


def packed_gemv(bits: int, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows <= 4, in] float32 or bfloat16 -> [rows, out] of the same dtype; bias likewise."""
    x = x.contiguous()
    y = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype)
    _check(
        _gemv().qwenfit_packed_gemv(
            bits,
            weight,
            x.data_ptr(),
            x.shape[0],
            x.shape[1],
            y.data_ptr(),
            _pointer(bias),
            DTYPES[x.dtype],
            _threads(),
        )
    )
    return y


def bf16_gemv(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows <= 4, in] float32 or bfloat16 times weight [out, in] of bfloat16 -> [rows, out] of x's dtype."""
    x = x.contiguous()
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    shape = _bf16_weight(weight)
    _check(
        _gemv().qwenfit_bf16_gemv(
            shape, x.data_ptr(), x.shape[0], y.data_ptr(), _pointer(bias), DTYPES[x.dtype], _threads()
        )
    )
    return y


def packed_gemm(bits: int, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in] -> [rows, out] of the same dtype, computed in float32; any number of rows."""
    padding = weight.in_features - x.shape[1]
    return _multiply(bits, weight, torch.nn.functional.pad(x, (0, padding)) if padding else x, bias)


def bf16_gemm(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in] times weight [out, in] of bfloat16 -> [rows, out] of x's dtype, computed in float32."""
    return _multiply(16, _bf16_weight(weight), x, bias)


@functools.cache
def tiles() -> bool:
    """Whether this CPU has AMX, the system grants its registers, and the kernel that uses them was compiled."""
    return available() and not isinstance(_load("tiles.c"), str) and _tiles() is not None


def why_no_tiles() -> str:
    """ "; no tiles: ..." on a CPU that has AMX where they are not used all the same, else empty."""
    if "amx_bf16" not in _cpu() or tiles():
        return ""
    loaded = _load("tiles.c")
    return f"; no tiles: {loaded if isinstance(loaded, str) else 'the compiler or the system does not give AMX'}"


def packed_tiles(bits: int, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in] bfloat16 -> [rows, out] bfloat16, the weight rounded to bfloat16; where there are `tiles`."""
    return _by_tiles(bits, weight, x, bias)


def bf16_tiles(weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [rows, in] bfloat16 times weight [out, in] of bfloat16 -> [rows, out] bfloat16; where there are `tiles`."""
    return _by_tiles(16, _bf16_weight(weight), x, bias)


def _by_tiles(bits: int, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    x = x.contiguous()
    y = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype)
    library = _tiles()
    assert library is not None
    _check(
        library.qwenfit_tiles(
            bits, weight, x.data_ptr(), *x.shape, y.data_ptr(), _pointer(bias), DTYPES[x.dtype], _threads()
        )
    )
    return y


def unpack(bits: int, weight: Weight, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The packed weight as [out, in_features] of float32 or bfloat16."""
    result = torch.empty(weight.out_features, in_features, dtype=dtype)
    _gemm().qwenfit_unpack(bits, weight, in_features, result.data_ptr(), DTYPES[dtype], _threads())
    return result


def _multiply(bits: int, weight: Weight, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    wide = x.float().contiguous()
    y = torch.empty(x.shape[0], weight.out_features, dtype=x.dtype)
    _check(
        _gemm().qwenfit_gemm(
            bits, weight, wide.data_ptr(), x.shape[0], y.data_ptr(), _pointer(bias), DTYPES[x.dtype], _threads()
        )
    )
    return y


def _bf16_weight(weight: torch.Tensor) -> Weight:
    out_features, in_features = weight.shape
    return Weight(weight.data_ptr(), None, None, out_features, in_features, in_features)


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads() -> int:
    return torch.get_num_threads()


def _check(failed: int) -> None:
    if failed:
        raise MemoryError("out of memory in a matrix product")


@functools.cache
def _gemv() -> ctypes.CDLL:
    library = _load("gemv.c")
    assert isinstance(library, ctypes.CDLL), library
    number, long, pointer, weight = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.POINTER(Weight)
    common = (number, long, pointer, pointer, number, number)
    library.qwenfit_packed_gemv.argtypes = [number, weight, pointer, *common]
    library.qwenfit_bf16_gemv.argtypes = [weight, pointer, number, pointer, pointer, number, number]
    return library


@functools.cache
def _gemm() -> ctypes.CDLL:
    library = _load("gemm.c")
    assert isinstance(library, ctypes.CDLL), library
    number, long, pointer, weight = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.POINTER(Weight)
    library.qwenfit_gemm.argtypes = [number, weight, pointer, long, pointer, pointer, number, number]
    library.qwenfit_unpack.argtypes = [number, weight, long, pointer, number, number]
    library.qwenfit_unpack.restype = None
    return library


@functools.cache
def _tiles() -> ctypes.CDLL | None:
    """None where the system does not grant the registers to this process, in which the first instruction would end it.

    What is granted holds for all of the process's threads.
    """
    library = _load("tiles.c")
    assert isinstance(library, ctypes.CDLL), library
    if not library.qwenfit_tiles_granted():
        return None
    number, long, pointer, weight = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p, ctypes.POINTER(Weight)
    library.qwenfit_tiles.argtypes = [number, weight, pointer, long, long, pointer, pointer, number, number]
    return library


def _load(name: str) -> ctypes.CDLL | str:
    return load(Path(__file__).with_name(name))


def cache_folder(kind: str) -> Path:
    """Where compiled code of a kind is kept; raises OSError for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwenfit" / kind
    except RuntimeError as failure:
        raise OSError(str(failure)) from None


@functools.cache
def load(source: Path) -> ctypes.CDLL | str:
    """A C file of this folder compiled and loaded, or the reason why it could not be."""
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CC", ""), "cc", "gcc", "clang"])), None)
    if compiler is None:
        return "no C compiler was found (apt install gcc)"
    # The binary holds this CPU's instructions, and a home directory may be shared between machines.
    texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
    key = "\n".join([*texts, compiler, *_FLAGS, _cpu()])
    try:
        target = cache_folder("native") / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.so"
        if not target.exists():
            _compile(compiler, source, target)
        _share_openmp()
        library = ctypes.CDLL(str(target))
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stderr.splitlines() if "error" in line] or [f"exit status {error.returncode}"]
        return f"{compiler} could not compile them: {lines[0]}"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"they could not be built or loaded: {error}"
    return library


def _compile(compiler: str, source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        built, linked = Path(folder) / "native.o", Path(folder) / "native.so"
        # Linked without -fopenmp: the symbols come from the OpenMP runtime that torch has loaded, see _share_openmp.
        for command in ([*_FLAGS, "-c", str(source), "-o", str(built)], ["-shared", str(built), "-o", str(linked)]):
            subprocess.run([compiler, *command], check=True, capture_output=True, text=True, timeout=120)
        linked.replace(target)  # atomic: another process may be doing the same


def _share_openmp() -> None:
    """Make the symbols of torch's OpenMP runtime visible, so that one pool of threads serves both.

    A second runtime would bring its own threads, which spin against torch's for the same cores.
    """
    with open("/proc/self/maps") as maps:
        runtimes = set(re.findall(r"/\S*/lib(?:gomp|omp|iomp5)[^/\s]*\.so\S*", maps.read()))
    for path in runtimes:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def _cpu() -> str:
    with open("/proc/cpuinfo") as cpuinfo:
        flags = next((line for line in cpuinfo if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()} {flags}"
