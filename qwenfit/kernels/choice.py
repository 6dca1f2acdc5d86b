"""Which kernel multiplies by a weight: the one place that decides, and says why."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass

import torch

from qwenfit.kernels import native

KINDS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
# On a GPU, as measured on an H100 and an H200:
MATVEC_ROWS = 4  # of activations with plain weights; above, the vendor's product wins
TILES_ROWS = (3, 32)  # first and last, with plain weights of 16 bits on a Hopper, before either
HOPPER_ROWS = 192  # last, with bfloat16 weights on a Hopper
INT_MATVEC_ROWS = 2  # with int4 and int8 weights; above, the tensor cores win
INT_LANES_ROWS = 8  # with int4 weights; above, tiles in shared memory win
INT_MATMUL_ROWS = {
    4: 384,
    8: 128,
}  # by bits; above, unpacking for the vendor's product costs less than it saves
_ONEDNN_ROWS = 24  # from here on, unpacking to bf16 for oneDNN costs less than it saves


@dataclass(frozen=True)
class KernelChoice:
    name: str
    reason: str


_TILES = KernelChoice("native tiles", "AMX: the weight goes through the caches as tiles of bf16, whatever its type")


@functools.lru_cache(maxsize=4096)
def choose_kernel(weight: str, dtype: torch.dtype, rows: int, device: str) -> KernelChoice:
    """The kernel for a weight of kind "fp32", "fp16", "bf16", "int8" or "int4" on a device type.

    `rows` counts the rows of the activations and `dtype` is theirs.
    """
    if device != "cpu":
        if weight in ("int4", "int8"):
            if device == "cuda" and not _triton_missing():
                if rows <= INT_MATVEC_ROWS:
                    return KernelChoice("triton matvec", "few rows: codes are multiplied as integers, at memory speed")
                if weight == "int4" and rows <= INT_LANES_ROWS:
                    return KernelChoice(
                        "triton lanes", "few rows: codes go from memory to the tensor cores, each lane's by itself"
                    )
                if rows <= INT_MATMUL_ROWS[int(weight[3:])]:
                    return KernelChoice(
                        "triton matmul", "some rows: codes go to the tensor cores, none is unpacked to memory"
                    )
                return KernelChoice("unpack", "many rows: unpacked to 16 bits for the vendor's library")
            return KernelChoice("dequantize", f"no packed kernel for {device}: unpacked in pieces at each use")
        return KernelChoice("torch", "the vendor's library behind torch.nn.functional.linear")
    if weight in ("int4", "int8"):
        return _choose_cpu_packed(weight, dtype, rows)
    return _choose_cpu_plain(weight, dtype, rows)


def _choose_cpu_plain(weight: str, dtype: torch.dtype, rows: int) -> KernelChoice:
    if weight == "fp32":
        return KernelChoice("torch", "float32: the BLAS in torch")
    if weight == "bf16":
        if native.available() and rows <= native.GEMV_ROWS:
            return KernelChoice("native gemv", "few rows: bound by memory, which torch reads at half the speed")
        if dtype == torch.bfloat16 and native.tiles():
            return _TILES
        if dtype == torch.bfloat16 and onednn_bf16():
            return KernelChoice("torch", "oneDNN with the CPU's bf16 instructions")
        if native.available():
            return KernelChoice("native gemm", "widened to float32 in cache-sized panels: no bf16 instructions to use")
    missing = "" if weight == "fp16" else f"; the faster C kernels are missing: {native.why_not()}"
    if rows == 1 and weight == KINDS[dtype]:
        return KernelChoice("torch", f"torch's matrix-vector product{missing}")
    return KernelChoice("widen", f"pieces of the weight converted to float32 for the BLAS{missing}")


def _choose_cpu_packed(weight: str, dtype: torch.dtype, rows: int) -> KernelChoice:
    if native.available():
        if rows <= native.GEMV_ROWS:
            return KernelChoice("native gemv", "few rows: codes are unpacked in registers")
        if dtype == torch.bfloat16 and native.tiles():
            return _TILES
        if dtype == torch.bfloat16 and rows >= _ONEDNN_ROWS and onednn_bf16():
            return KernelChoice("unpack", f"many rows: unpacked to bf16 in pieces for oneDNN{native.why_no_tiles()}")
        return KernelChoice("native gemm", "unpacked to float32 in cache-sized panels")
    missing = f"; the faster C kernels are missing: {native.why_not()}"
    if weight == "int4" and dtype == torch.bfloat16:
        return KernelChoice("int4pack", f"torch's int4 kernel{missing}")
    return KernelChoice("dequantize", f"unpacked in pieces at each use, slow{missing}")


@functools.cache
def _triton_missing() -> bool:
    return importlib.util.find_spec("triton") is None


@functools.cache
def onednn_bf16() -> bool:
    return bool(torch._C._has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported())
