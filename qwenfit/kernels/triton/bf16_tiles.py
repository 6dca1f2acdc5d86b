"""Products of some activation rows with a bfloat16 or float16 weight by a Hopper's tensor cores.

The weight is the first operand. The copy engine (TMA) brings its tiles, as many ahead as the shared memory holds, and
the first ones are asked for while the kernel before still runs. `bf16_matvec_reference` is the definition.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from qwenfit.kernels.triton.launch import INTERPRETED, options, prefetch_rows, start_after_previous
from qwenfit.kernels.triton.parts import room_for_parts, sum_parts
from qwenfit.kernels.triton.tuning import tuned

_SHARED = 220 << 10  # bytes of a core for tiles


def has_bf16_tiles(weight: torch.Tensor) -> bool:
    """Whether the weight has 16 bits a number, in rows that the copy engine takes, and the card is a Hopper.

    There this was measured; and others may have less shared memory.
    """
    aligned = weight.shape[1] % 8 == 0 and weight.data_ptr() % 16 == 0 and weight.is_contiguous()
    return aligned and weight.itemsize == 2 and _is_hopper(weight.device)


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return INTERPRETED or torch.cuda.get_device_capability(device)[0] == 9


def bf16_tiles(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gated: bool = False,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """`bf16_matvec_reference` without a norm, for at most 64 contiguous rows: one kernel. `out` may be `residual`.

    `config`: `rows` of the weight in a program's tile (each of a gate's halves has so many), `columns` of a tile, the
    `splits` of the columns among programs, whose sums the last one adds in order (none with a gate), `warps`, and how
    many programs a core is to hold `beside` each other: they share the memory for tiles.
    """
    rows, (out_features, in_features) = x.shape[0], weight.shape
    outputs = out_features // (2 if gated else 1)
    if out is None:
        out = torch.empty(rows, outputs, dtype=dtype or x.dtype, device=x.device)
    config = config or tuned("bf16_tiles", (int(gated), in_features, out_features, rows))
    tile, columns, splits = config["rows"], config["columns"], 1 if gated else config["splits"]
    m = max(16, 1 << (rows - 1).bit_length())
    tiles = triton.cdiv(outputs, tile)
    parts, arrived = room_for_parts(splits, tiles, tile * m, x.device)
    stage = (m + tile * (2 if gated else 1)) * columns * x.itemsize
    _bf16_tiles[(tiles, splits)](
        _described(x, m, columns), _described(weight, tile, columns), weight, bias, residual, out, parts, arrived,
        rows, outputs, in_features, triton.cdiv(triton.cdiv(in_features, columns), splits),
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, GATED=gated,
        TILE_M=m, TILE_OUT=tile, COLUMNS=columns, SPLITS=splits, WARPS=config["warps"], INTERPRETED=INTERPRETED,
        num_warps=config["warps"], num_stages=max(2, _SHARED // config["beside"] // stage), **options(x),
    )  # fmt: skip
    return out


def _described(tensor: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, columns])


@triton.jit(do_not_specialize=["rows", "inputs", "steps"])
def _bf16_tiles(
    x, w, w_ptr, bias_ptr, residual_ptr, y_ptr, part_ptr, arrived_ptr, rows, outputs, inputs, steps,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, GATED: tl.constexpr,
    TILE_M: tl.constexpr, TILE_OUT: tl.constexpr, COLUMNS: tl.constexpr, SPLITS: tl.constexpr, WARPS: tl.constexpr,
    INTERPRETED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    first, begin = tile * TILE_OUT, split * steps
    if not INTERPRETED:
        prefetch_rows(w_ptr, first, outputs, begin * COLUMNS, inputs, TILE_OUT, 4, WARPS)
        if GATED:
            prefetch_rows(w_ptr, outputs + first, 2 * outputs, begin * COLUMNS, inputs, TILE_OUT, 4, WARPS)
    start_after_previous(OVERLAP)
    output, m = first + tl.arange(0, TILE_OUT)[:, None], tl.arange(0, TILE_M)[None, :]
    place, here = m * outputs + output, (output < outputs) & (m < rows)
    residual = place
    if HAS_RESIDUAL:  # asked for before it is waited for
        residual = tl.load(residual_ptr + place, mask=here, other=0.0)
    y = tl.zeros([TILE_OUT, TILE_M], tl.float32)
    up = y
    for step in range(begin, tl.minimum(begin + steps, tl.cdiv(inputs, COLUMNS))):
        columns = x.load([0, step * COLUMNS]).T
        y = _dot(w.load([first, step * COLUMNS]), columns, y, INTERPRETED)
        if GATED:
            up = _dot(w.load([outputs + first, step * COLUMNS]), columns, up, INTERPRETED)
    last = True
    if SPLITS > 1:
        y, last = sum_parts(y, part_ptr, arrived_ptr, tile, split, SPLITS)
    if last:
        if HAS_BIAS:
            y += tl.load(bias_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)
        if GATED:
            if HAS_BIAS:
                up += tl.load(bias_ptr + outputs + output, mask=output < outputs, other=0.0).to(tl.float32)
            y = y * tl.sigmoid(y) * up
        if HAS_RESIDUAL:
            y += residual.to(tl.float32)
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=here)


@triton.jit
def _dot(a, b, total, INTERPRETED: tl.constexpr):
    """total + a b; the interpreter has no product of bfloat16."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        return tl.dot(a, b, total)
