"""Four bytes to a word: packing them, and dot products of them (dp4a), with the same in plain arithmetic beside."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def low_bytes(a, b, c, d, INTERPRETED: tl.constexpr):
    """The lowest bytes of four words as one word, a's the lowest."""
    if INTERPRETED:
        return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | (d & 255) << 24
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, u; prmt.b32 t, $1, $2, 0x0040; prmt.b32 u, $3, $4, 0x0040; prmt.b32 $0, t, u, 0x5410; }",
            "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def second_bytes(a, b, c, d, INTERPRETED: tl.constexpr):
    """As `low_bytes`, of the bytes above the lowest."""
    if INTERPRETED:
        return low_bytes(a >> 8, b >> 8, c >> 8, d >> 8, True)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, u; prmt.b32 t, $1, $2, 0x0051; prmt.b32 u, $3, $4, 0x0051; prmt.b32 $0, t, u, 0x5410; }",
            "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def dot_low(codes, x, acc, INTERPRETED: tl.constexpr):
    """acc + the dot product of four unsigned bytes and four unsigned bytes."""
    if INTERPRETED:
        for k in tl.static_range(4):
            acc += ((codes >> 8 * k) & 255) * ((x >> 8 * k) & 255)
        return acc
    else:
        return tl.inline_asm_elementwise(
            "dp4a.u32.u32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, acc], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def dot_high(codes, x, acc, INTERPRETED: tl.constexpr):
    """acc + the dot product of four unsigned bytes and four signed bytes."""
    if INTERPRETED:
        for k in tl.static_range(4):
            acc += ((codes >> 8 * k) & 255) * ((((x >> 8 * k) & 255) ^ 128) - 128)
        return acc
    else:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, x, acc], dtype=tl.int32, is_pure=True, pack=1
        )
