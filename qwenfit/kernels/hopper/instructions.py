"""The files of CUDA C++ beside this one, and a Hopper's product as a function, which has a name for every register."""

from __future__ import annotations

from importlib import resources


def text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def wgmma(columns: int) -> str:
    """`wgmma`, which adds a product of 64 rows, `columns` and 16 numbers to the sums of a group of 128 threads."""
    count = columns // 2
    return f"""
__device__ inline void wgmma(float (&sums)[{count}], u64 x, u64 w, bool add) {{
    asm volatile("{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{count + 2}, 0;\\n"
        "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 "
        "{{{_names(count)}}}, %{count}, %{count + 1}, p, 1, 1, 0, 0;\\n}}"
        : {_operands(count)} : "l"(x), "l"(w), "r"((int)add));
}}
"""


def wgmma_held(columns: int) -> str:
    """`wgmma_held`: the same of rows that are in registers, four of each thread, and w as `described_across`."""
    count = columns // 2
    return f"""
__device__ inline void wgmma_held(float (&sums)[{count}], const u32* rows, u64 w) {{
    asm volatile("{{\\nwgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 "
        "{{{_names(count)}}}, {{{_names(4, count)}}}, %{count + 4}, 1, 1, 1, 1;\\n}}"
        : {_operands(count)} : "r"(rows[0]), "r"(rows[1]), "r"(rows[2]), "r"(rows[3]), "l"(w));
}}
"""


def _names(count: int, first: int = 0) -> str:
    return ", ".join(f"%{first + i}" for i in range(count))


def _operands(count: int) -> str:
    return ", ".join(f'"+f"(sums[{i}])' for i in range(count))
