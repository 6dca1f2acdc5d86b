"""CUDA C++ for a Hopper: compiled by the NVRTC that comes with torch, launched through the driver.

Nothing depends on it: where it is missing, products go through the vendor's library, and attention through Triton.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from qwenfit.kernels.native import cache_folder

_OPTIONS = (b"--gpu-architecture=sm_90a", b"--std=c++17")
_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CLUSTER, _OVERLAP = 4, 6  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION
_BFLOAT16, _SWIZZLED, _LINES = 9, 3, 2  # CU_TENSOR_MAP_DATA_TYPE_, _SWIZZLE_128B, _L2_PROMOTION_L2_128B
TensorMap = ctypes.c_uint64 * 16


class Missing(Exception):
    """Why CUDA C++ cannot be compiled or loaded here."""


class _Attribute(ctypes.Structure):  # CUlaunchAttribute: an id, and a value in 64 bytes
    _fields_ = (("which", ctypes.c_uint), ("_", ctypes.c_uint), ("value", ctypes.c_uint * 16))


class _Launch(ctypes.Structure):  # CUlaunchConfig
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("number", ctypes.c_uint),
    )


class Kernel:
    """A kernel on a device, the current one."""

    def __init__(self, binary: bytes, name: str, threads: int, shared: int, cluster: int) -> None:
        _need_context(torch.cuda.current_device())
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(module), binary))
        _check(_driver().cuModuleGetFunction(ctypes.byref(self._function), module, name.encode()))
        _check(_driver().cuFuncSetAttribute(self._function, _SHARED_BYTES, shared))
        self._attributes = (_Attribute * 2)()
        self._attributes[0].which, self._attributes[1].which = _CLUSTER, _OVERLAP
        self._attributes[0].value[:3] = (cluster, 1, 1)
        self._attributes[1].value[0] = 1
        self._launch = _Launch(block=(threads, 1, 1), shared=shared, attributes=self._attributes, number=2)

    def __call__(self, programs: int, stream: int, arguments: Sequence[ctypes._CDataType]) -> None:
        """Launch so many programs; they may begin while what was launched before them ends."""
        launch = _Launch.from_buffer_copy(self._launch)
        launch.grid[:], launch.stream = (programs, 1, 1), stream
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        _check(_driver().cuLaunchKernelEx(ctypes.byref(launch), self._function, pointers, None))


def _need_context(device: int) -> None:
    """Torch's context of the device, for a thread that has done nothing on it yet."""
    context = ctypes.c_void_p()
    _check(_driver().cuCtxGetCurrent(ctypes.byref(context)))
    if not context.value:
        _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        _check(_driver().cuCtxSetCurrent(context))


@functools.lru_cache(maxsize=4096)
def tensor_map(pointer: int, rows: int, columns: int, stride: int, box_rows: int) -> ctypes.Array[ctypes.c_uint64]:
    """Tiles of `box_rows` rows and 64 columns, swizzled, of a bfloat16 matrix; nought beyond its ends.

    A row begins `stride` numbers, a multiple of 8, behind the one before it.
    """
    room = (ctypes.c_uint64 * 24)()  # a map lies at a multiple of 64 bytes
    described = TensorMap.from_buffer(room, -ctypes.addressof(room) % 64)
    _check(
        _driver().cuTensorMapEncodeTiled(
            ctypes.byref(described), _BFLOAT16, 2, ctypes.c_void_p(pointer),
            (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(stride * 2),
            (ctypes.c_uint32 * 2)(64, box_rows), (ctypes.c_uint32 * 2)(1, 1), 0, _SWIZZLED, _LINES, 0,
        )
    )  # fmt: skip
    return described


def kernel_of(source: str, name: str, device: torch.device, threads: int, shared: int, cluster: int = 1) -> Kernel:
    """Of so many threads and bytes of shared memory, compiled and loaded; raises Missing, or what the driver says."""

    def load(fresh: bool) -> Kernel:
        binary = compiled(source, name, fresh)
        with torch.cuda.device(device):
            return Kernel(binary, name, threads, shared, cluster)

    try:
        return load(fresh=False)
    except RuntimeError:  # a file of the cache that was not written to its end, say
        return load(fresh=True)


def why_missing(device: torch.device, make: Callable[[], Kernel]) -> str:
    """Why there is no such kernel on a GPU; empty where it is there."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "it is for Hopper GPUs"
    try:
        make()
    except (Missing, OSError, RuntimeError, AttributeError) as failure:
        return str(failure)
    return ""


@functools.cache
def cores(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def compiled(source: str, name: str, fresh: bool = False) -> bytes:
    """The machine code, from the cache if it is there and not to be made `fresh`; raises Missing."""
    library = _nvrtc()
    version = (ctypes.c_int * 2)()
    library.nvrtcVersion(ctypes.byref(version), ctypes.byref(version, ctypes.sizeof(ctypes.c_int)))
    key = hashlib.sha256(repr((source, name, _OPTIONS, tuple(version))).encode()).hexdigest()[:24]
    if not fresh:
        with contextlib.suppress(OSError):
            return (cache_folder("cuda") / f"{key}.cubin").read_bytes()
    binary = _compile(library, source, name)
    with contextlib.suppress(OSError):  # compiled again next time
        cache = cache_folder("cuda") / f"{key}.cubin"
        cache.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=cache.parent, delete=False) as file:
            file.write(binary)
        Path(file.name).replace(cache)  # atomic: another process may be doing the same
    return binary


def _compile(library: ctypes.CDLL, source: str, name: str) -> bytes:
    program, options = ctypes.c_void_p(), (ctypes.c_char_p * len(_OPTIONS))(*_OPTIONS)
    if library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None):
        raise Missing("NVRTC makes no program")
    try:
        if library.nvrtcCompileProgram(program, len(_OPTIONS), options):
            raise Missing(f"NVRTC cannot compile {name}: {_text(library, program, 'ProgramLog').decode().strip()}")
        return _text(library, program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, text)
    return text.raw if what == "CUBIN" else text.value


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
        _ = library.cuLaunchKernelEx, library.cuTensorMapEncodeTiled
    except (OSError, AttributeError) as failure:  # none, or one older than CUDA 12
        raise Missing(f"the driver: {failure}") from None
    return library


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The library that torch was built with, found as torch's packages lay it out, else as the system does."""
    major = (torch.version.cuda or "").split(".")[0]
    folders = [Path(path, "nvidia", package, "lib") for path in sys.path for package in (f"cu{major}", "cuda_nvrtc")]
    for folder in folders:
        for builtins in folder.glob("libnvrtc-builtins.so.*"):  # which it would look for where the system does
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    for path in [*(folder / f"libnvrtc.so.{major}" for folder in folders), Path(f"libnvrtc.so.{major}")]:
        try:
            return ctypes.CDLL(str(path))
        except OSError:
            continue
    raise Missing(f"no libnvrtc.so.{major}")


def _check(failed: int) -> None:
    if failed:
        said = ctypes.c_char_p()
        _driver().cuGetErrorString(failed, ctypes.byref(said))
        raise RuntimeError(f"CUDA driver: {(said.value or b'unknown error').decode()}")
