"""Products of 33 to 192 activation rows with a bfloat16 weight, and what stands after them, in one kernel."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch

from qwenfit.kernels.hopper.compiled import Kernel, cores, kernel_of, tensor_map, why_missing
from qwenfit.kernels.hopper.instructions import text, wgmma
from qwenfit.kernels.triton.bf16_tiles import has_bf16_tiles
from qwenfit.kernels.triton.launch import compiled_instead

LEAST_OUTPUTS = 512  # of a weight: a tile has no more
MOST_COLUMNS = ((256, 208, 160), (256, 208, 176))  # of a tile, without a gate and with: by groups, what registers hold
LEAST_COLUMNS = 32  # what is read as rows of x beyond the last is in the block then
NARROW = 48  # columns of a tile: fewer, and the inputs are split
CORES_IN_FOURS = 120  # of 132: the rest have no three neighbours
SHARED_BYTES = 226 << 10  # of a program, for blocks


@dataclass(frozen=True)
class Layout:
    """How product.cu divides a product; its words are explained there."""

    rows: int  # of x, for which there is room in shared memory: a multiple of 32, 64 to HOPPER_ROWS
    columns: int  # of a tile, a gate's and its partner's together: a multiple of 8, with a gate of 16
    splits: int = 1

    @property
    def groups(self) -> int:
        return -(-self.rows // 64)

    @property
    def threads(self) -> int:
        return 128 * self.groups + 64

    @property
    def blocks(self) -> int:
        return min(24, SHARED_BYTES // self._bytes)

    @property
    def shared(self) -> int:
        """Bytes of a program's shared memory: blocks, and two barriers for each."""
        return self.blocks * (self._bytes + 16)

    @property
    def _bytes(self) -> int:
        return 128 * (self.rows + self.columns)

    def tiles(self, outputs: int, gated: bool) -> int:
        return -(-outputs // (self.columns // (2 if gated else 1)))

    def programs(self, outputs: int, gated: bool, cores: int) -> int:
        """As many as there are tiles, or as the card holds; all of them where the inputs are split."""
        tiles = self.tiles(outputs, gated)
        return tiles * self.splits if self.splits > 1 else min(tiles, cores)


def source(layout: Layout, gated: bool, wide: bool, add: bool, bias: bool, early: bool) -> str:
    """product.cu for one layout: what is defined for it, the instructions, and the kernel."""
    defined = {
        "ROWS": layout.rows, "COLUMNS": layout.columns, "SPLITS": layout.splits, "BLOCKS": layout.blocks,
        "GATED": gated, "WIDE": wide, "ADD": add, "BIAS": bias, "EARLY": early,
    }  # fmt: skip
    parts = [f"#define {name} {int(value)}" for name, value in defined.items()]
    return "\n".join([*parts, text("primitives.cuh"), wgmma(layout.columns), text("fragments.cuh"), text("product.cu")])


def has_hopper_product(weight: torch.Tensor) -> bool:
    """Whether the weight is bfloat16, in rows that the copy engine takes, on a Hopper that can be compiled for."""
    tiled = weight.shape[0] % 16 == 0 and weight.shape[0] >= LEAST_OUTPUTS and weight.dtype == torch.bfloat16
    return tiled and weight.is_cuda and has_bf16_tiles(weight) and not why_not(weight.device)


@functools.cache
def why_not(device: torch.device) -> str:
    """Why the kernel is missing on a GPU; empty where it is there."""
    return why_missing(device, lambda: _kernel(Layout(64, 64), False, False, False, False, False, device))


def hopper_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    layout: Layout | None = None,
    early: bool = True,
) -> torch.Tensor:
    """`bf16_matvec_reference` without a norm, for bfloat16 x [rows <= HOPPER_ROWS, inputs].

    The result is bfloat16, or with `dtype` float32, in `out` if given; a residual is float32, and becomes the result.
    early: the weight was there before the kernel before this one began, which may still run.
    """
    x = x.contiguous()
    (rows, inputs), outputs = x.shape, weight.shape[0] // (2 if gated else 1)
    wide = residual is not None or dtype == torch.float32
    if residual is not None:
        out = residual
    elif out is None:
        out = torch.empty(rows, outputs, dtype=torch.float32 if wide else x.dtype, device=x.device)
    layout = layout or chosen(rows, inputs, weight.shape[0], gated, cores(x.device))
    variant = layout, gated, wide, residual is not None, bias is not None, early, x.device
    if compiled_instead(variant, lambda: _kernel(*variant)):
        return out
    brought = -(-rows // 8) * 8  # rows, by the copy engine: it is slow to fill up what is not there
    numbers = rows, outputs, -(-inputs // 64), layout.tiles(outputs, gated), brought
    _kernel(*variant)(
        layout.programs(outputs, gated, cores(x.device)),
        torch.cuda.current_stream(x.device).cuda_stream,
        (
            tensor_map(x.data_ptr(), rows, inputs, inputs, brought),
            tensor_map(weight.data_ptr(), weight.shape[0], inputs, inputs, layout.columns // (2 if gated else 1)),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_void_p(None if bias is None else bias.data_ptr()),
            *map(ctypes.c_int, numbers),
        ),
    )
    return out


@functools.cache
def _kernel(
    layout: Layout, gated: bool, wide: bool, add: bool, bias: bool, early: bool, device: torch.device
) -> Kernel:
    text = source(layout, gated, wide, add, bias, early)
    return kernel_of(text, "hopper_product", device, layout.threads, layout.shared, layout.splits)


def room_for(rows: int) -> int:
    """The `rows` of a layout for so many."""
    return max(64, -(-rows // 32) * 32)


@functools.lru_cache(maxsize=4096)
def chosen(rows: int, inputs: int, out_features: int, gated: bool, cores: int) -> Layout:
    """Tiles for one round of the card, or as few rounds as can be; parts of the inputs where tiles would be narrow."""
    step, width, splits = 16 if gated else 8, out_features, 1
    most = MOST_COLUMNS[gated][-(-rows // 64) - 1]
    if not gated and out_features < NARROW * cores and inputs >= 1024:
        splits = 2 if 2 * out_features >= NARROW * cores else 4
        width, cores = out_features * splits, cores if splits == 2 else cores * CORES_IN_FOURS // 132
    columns = -(-width // (-(-width // (most * cores)) * cores))
    return Layout(room_for(rows), max(LEAST_COLUMNS, -(-columns // step) * step), splits)
