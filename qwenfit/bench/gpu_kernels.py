"""Check, tune and time the Triton kernels of decoding: `python -m qwenfit.bench.gpu_kernels --out FOLDER`.

Every kernel is compared with its float32 reference at the shapes of real models, then timed by replaying a CUDA graph
of launches that walk over more than 200 MB of weights, so that no cache holds them. For each shape a list of configs
is measured and the best kept, in FOLDER/tuned.json; processes beside this one compile them first. The table gives each
kernel's bytes, its rate, and that rate's share of what plain reading reaches on the card. Data is random, never zeros.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from qwenfit.bench.gpu_common import need_gpu, record_head
from qwenfit.kernels.attention import LayerCache
from qwenfit.kernels.kv_quant import quantize_kv
from qwenfit.kernels.triton import tuning
from qwenfit.kernels.triton.bf16_matvec import bf16_matvec, bf16_matvec_reference
from qwenfit.kernels.triton.decode_attention import (
    NewTokens,
    Parts,
    contexts_in_parts,
    decode_attention_reference,
    decode_step_attention,
)
from qwenfit.kernels.triton.int_matvec import BlockedWeight, int_matvec, int_matvec_reference
from qwenfit.kernels.triton.launch import device_limits
from qwenfit.kernels.triton.layout import join_zeros
from qwenfit.kernels.triton.parts import arrival_counters
from qwenfit.kernels.triton.rotary_cache import rotary_cache_reference

Config = dict[str, int]
SHAPES = {  # (in, out, gated, normed, with a residual) of the products of a decoding step
    "Qwen-7B": [
        (4096, 12288, False, True, False),
        (4096, 4096, False, False, True),
        (4096, 22016, True, True, False),
        (11008, 4096, False, False, True),
    ],
    "Qwen-1.8B": [
        (2048, 6144, False, True, False),
        (2048, 2048, False, False, True),
        (2048, 11008, True, True, False),
        (5504, 2048, False, False, True),
    ],
}
SHAPES["Qwen-14B"] = [
    (5120, 15360, False, True, False),
    (5120, 5120, False, False, True),
    (5120, 27392, True, True, False),
    (13696, 5120, False, False, True),
]
SHAPES["Qwen-72B"] = [
    (8192, 24576, False, True, False),
    (8192, 8192, False, False, True),
    (8192, 49152, True, True, False),
    (24576, 8192, False, False, True),
]
SHAPES["Qwen2.5-7B"] = [
    (3584, 4608, False, True, False),
    (3584, 3584, False, False, True),
    (3584, 37888, True, True, False),
    (18944, 3584, False, False, True),
]
HEADS = {"Qwen-7B": 32, "Qwen-1.8B": 16, "Qwen-14B": 40, "Qwen-72B": 64}  # of attention, 128 numbers each
GROUPS = [(28, 4), (32, 8)]  # heads, and those of keys and values: Qwen2.5-7B and Qwen3-8B
VOCABULARIES = [(5120, 152064), (8192, 152064)]  # heads of the models that were not tuned yet
ROTATED_BYTES = 400 << 20
COMPILERS = 14  # processes
PARTS = "int4,attention,int8,bf16,rows,groups,uneven"
SHORT = 200  # tokens of all sequences but one, where lengths are uneven


@dataclass
class Row:
    """One line of the table."""

    kernel: str
    shape: str
    us: float
    bytes: int
    gb_s: float
    share: float  # of the measured read limit
    error: float
    config: Config


def time_us(launches: list[Callable[[], object]]) -> float:
    """Microseconds of one launch: the median over replays of a graph that holds them all, one after the other."""
    for launch in launches[:2]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times: list[float] = []
    for _ in range(7):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(float(start.elapsed_time(stop)) * 1e3 / len(launches))
    return sorted(times)[len(times) // 2]


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    return float((out.float() - reference.float()).norm() / reference.float().norm())


def random_blocked(bits: int, inputs: int, out: int, zeros: bool = False) -> BlockedWeight:
    """Random codes; scales of either sign, since the codes' mean is not their middle. zeros: each group has its own."""
    codes = torch.empty(out, inputs * bits // 32, dtype=torch.int32, device="cuda").random_(-(2**31), 2**31)
    deviation = ((4.0**bits - 1) / 12) ** 0.5
    scales = (torch.rand(out, inputs // 128, device="cuda") + 0.5) / deviation / inputs**0.5
    scales *= torch.randint_like(scales, 2) * 2 - 1
    scales = scales.half()
    if zeros:
        scales = join_zeros(scales, torch.randint_like(scales, 2, 2**bits - 2), bits)
    return BlockedWeight(bits, 128, 128, out, inputs, codes, scales, None)


def copies(make: Callable[[], Any], nbytes: int) -> list[Any]:
    """Enough equal-sized weights that reading them all passes the cache by."""
    return [make() for _ in range(max(2, -(-ROTATED_BYTES // nbytes)))]


def int_configs(bits: int, inputs: int, out: int, rows: int, cores: int = 0) -> Iterable[Config]:
    """Tiles that fit the inputs, with numbers of programs that share the tiles out evenly.

    14B's rows of 640 words are 2.5 tiles of 256, and its 27,392 outputs 1.62 rounds of 1,056 programs: each costs a
    fifth of the time. A core that holds half of its registers' worth lets the next kernel begin beside this one.
    """
    cores = cores or torch.cuda.get_device_properties().multi_processor_count
    needed = inputs * bits // 32
    if rows > 1:
        for words in (256, 512, 1024):
            if -(-needed // words) * words <= 1.61 * needed:
                for tile in (4, 8, 16):
                    for beside in (8, 12, 16):
                        programs = cores * beside * 128 // words
                        config = {"rows": tile, "words": words, "warps": words // 128, "programs": programs}
                        yield config
                        if 1 < -(-needed // words) <= 3:
                            yield config | {"hold": 1}
        yield {"rows": 8, "words": 512, "warps": 4, "programs": 4 * cores, "early": 0}
        return
    for words in (128, 256, 512, 1024, 2048):
        chunks = -(-needed // words)
        if chunks * words > 1.61 * needed or chunks > 3:
            continue
        for warps in (2, 4, 8, 16):
            beside = 128 * warps // words  # rows of the weight that the warps take beside each other
            for tile in (2, 4, 8, 16, 32, 64):
                held = tile * words // (32 * warps)  # words that a thread holds of a tile, and again of the next
                if not 32 * warps <= words <= 256 * warps or tile < 2 * beside or not 8 <= held <= 64:
                    continue
                resident = range(max(1, 4 // warps), max(1, (16 if held <= 16 else 12) // warps) + 1)
                for programs in even_programs(-(-out // tile), cores, resident):
                    yield {"rows": tile, "words": words, "warps": warps, "programs": programs, "hold": 1}
    for words in (256, 512):  # long rows in pieces, whose inputs are converted anew for each tile
        for tile in (8, 16) if needed > 512 else ():
            for beside in (4, 8) if words == 256 else (2, 4):
                yield {"rows": tile, "words": words, "warps": words // 128, "programs": beside * cores}


def even_programs(tiles: int, cores: int, resident: Iterable[int]) -> list[int]:
    """The three numbers of programs, of so many on a core, that share `tiles` out most evenly; more before fewer."""
    numbers = [cores * one for one in resident]
    return sorted(numbers, key=lambda n: (-round(tiles / (n * -(-tiles // n)), 2), -n))[:3]


def once_each(configs: Iterable[Config]) -> list[Config]:
    """One of all configs that the same compiled kernel serves."""
    return list({tuple(c for name, c in config.items() if name != "programs"): config for config in configs}.values())


def attention_configs(quantized: bool, sequences: int) -> Iterable[Config]:
    if sequences > 1:
        for tokens in (16, 32) if not quantized else (16, 32, 64, 128):
            for warps in (1, 2, 4):
                yield {"tokens": tokens, "warps": warps} | ({} if quantized else {"registers": 128})
        return
    for splits in (8, 16, 32):
        for tokens in (16, 32, 64) if not quantized else (32, 64, 128):
            for warps in (2, 4):
                yield {"tokens": tokens, "warps": warps, "splits": splits}


def group_configs(sequences: int) -> Iterable[Config]:
    """Of attention whose heads share keys and values."""
    for tokens, warps in ((32, 2), (32, 4), (64, 2), (64, 4), (128, 4), (128, 8)):
        for stages in (1, 3) if sequences == 1 else (1, 3, 5):
            config = {"tokens": tokens, "warps": warps, "stages": stages}
            yield from ({**config, "splits": splits} for splits in (16, 32, 64)) if sequences == 1 else (config,)


def bf16_configs(rows: int) -> Iterable[Config]:
    for tile in (2, 4, 8):
        for columns, warps in ((256, 1), (512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 8)):
            if tile * rows <= 32:
                yield {"rows": tile, "columns": columns, "warps": warps}


def best(configs: Iterable[Config], run: Callable[[Config], float]) -> tuple[Config, float]:
    timed = [(run(config), config) for config in configs]
    us, config = min(timed, key=lambda pair: pair[0])
    return config, us


class Compiler:
    """Stands in for Bench's timing in a process that only compiles its share of the configs, for the cache on disk."""

    def __init__(self, share: str) -> None:
        self.part, self.parts = map(int, share.split("/"))
        self.seen = 0

    def __call__(self, launches: list[Callable[[], object]]) -> float:
        self.seen += 1
        if self.seen % self.parts == self.part:
            launches[0]()
        return 1.0


def compile_beside(module: str, arguments: list[str], seconds: float, processes: int = COMPILERS) -> float:
    """Compile in `processes` of their own what this run of a module will measure; returns the seconds that it took.

    One that fails or is late costs time only: what it leaves out is compiled when it is measured.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", f"qwenfit.bench.{module}", *arguments, "--compile"]
    parts = min(processes, max(1, (os.cpu_count() or 2) - 2))
    running = [
        subprocess.Popen([*command, f"{part}/{parts}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for part in range(parts)
    ]
    for process in running:
        try:
            process.wait(max(0.1, seconds - (time.perf_counter() - began)))
        except subprocess.TimeoutExpired:
            process.kill()
    return time.perf_counter() - began


class Bench:
    def __init__(self, tune: bool, timer: Callable[[list[Callable[[], object]]], float] = time_us) -> None:
        self.tune = tune
        self.timer = timer
        self.compiling = timer is not time_us
        self.limits = {"read": 1.0} if self.compiling else device_limits()
        torch.cuda.empty_cache()
        self.rows: list[Row] = []
        self.configs: dict[str, Config] = {}
        self.failures: list[str] = []

    def attempt(self, what: Callable[..., None], *arguments: Any) -> None:
        """A part that fails is told and does not end the run."""
        try:
            what(*arguments)
        except Exception as error:
            self.failures.append(
                f"{getattr(what, '__name__', what)}{arguments[:3]}: {type(error).__name__}: {error}"[:300]
            )
            traceback.print_exc()

    def add(self, kernel: str, shape: str, us: float, nbytes: int, error: float, config: Config | None = None) -> None:
        rate = nbytes / us / 1e3
        self.rows.append(Row(kernel, shape, us, nbytes, rate, rate * 1e9 / self.limits["read"], error, config or {}))

    def choose(
        self, kernel: str, shape: tuple[int, ...], configs: Iterable[Config], run: Callable[[Config], float]
    ) -> tuple[Config, float]:
        """The best config, measured and kept if this run tunes; else the one in force."""
        if not self.tune:
            config = tuning.tuned(kernel, shape)
            return config, run(config)
        config, us = best(configs, run)
        self.configs[tuning.key(kernel, shape)] = config
        return config, us

    def int_products(self, bits: int, rows: int, shapes: Iterable[tuple[int, int, bool, bool, bool]]) -> None:
        for inputs, out, gated, normed, added in shapes:
            nbytes = inputs * out * bits // 8 + inputs // 128 * out * 2
            make = empty_blocked if self.compiling else random_blocked
            weights = copies(partial(make, bits, inputs, out), 1 << 40 if self.compiling else nbytes)
            x, norm, residual, y = operands(rows, inputs, out // 2 if gated else out, normed, added)

            def run(config: Config, w: Any = weights, a: Any = (x, norm, residual, y), g: bool = gated) -> float:
                return self.timer(
                    [partial(int_matvec, a[0], one, None, a[2], a[1], 1e-6, g, a[3], config) for one in w]
                )

            configs = [
                tuning.tuned("int_matvec", (bits, inputs, out, rows)),
                *int_configs(bits, inputs, out, rows),
            ]
            config, us = self.choose(
                "int_matvec", (bits, inputs, out, rows), once_each(configs) if self.compiling else configs, run
            )
            if self.compiling:
                continue
            got = int_matvec(x, weights[0], None, residual, norm, 1e-6, gated, y.fill_(torch.nan), config)
            error = relative_error(got, int_matvec_reference(x, weights[0], None, residual, norm, 1e-6, gated))
            self.add(f"int{bits} x{rows}", f"{inputs}->{out}", us, nbytes, error, config)

    def bf16_products(self, rows: int, shapes: Iterable[tuple[int, int, bool, bool, bool]]) -> None:
        for inputs, out, gated, normed, added in shapes:
            nbytes = inputs * out * 2
            weights = copies(partial(random_plain, inputs, out), 1 << 40 if self.compiling else nbytes)
            x, norm, residual, y = operands(rows, inputs, out // 2 if gated else out, normed, added)

            def run(config: Config, w: Any = weights, a: Any = (x, norm, residual, y), g: bool = gated) -> float:
                return self.timer(
                    [partial(bf16_matvec, a[0], one, None, a[2], a[1], 1e-6, g, None, a[3], config) for one in w]
                )

            config, us = self.choose("bf16_matvec", (inputs, out, rows), bf16_configs(rows), run)
            if self.compiling:
                continue
            got = bf16_matvec(x, weights[0], None, residual, norm, 1e-6, gated, None, y.fill_(torch.nan), config)
            error = relative_error(got, bf16_matvec_reference(x, weights[0], None, residual, norm, 1e-6, gated))
            self.add(f"bf16 x{rows}", f"{inputs}->{out}", us, nbytes, error, config)
            plain = self.timer([partial(torch.nn.functional.linear, x, one) for one in weights])
            self.add(f"cuBLAS bf16 x{rows}", f"{inputs}->{out}", plain, nbytes, 0.0)

    def attention(
        self,
        quantized: bool,
        heads: int,
        sequences: int,
        contexts: tuple[int, ...],
        kv_heads: int | None = None,
        uneven: bool = False,
    ) -> None:
        """The kernel of a step, at contexts of which each weighs the same in the choice of a config.

        Several sequences have 1.8 to 0.2 times as many tokens, the longest first, as the scheduler orders them; or,
        uneven, the first has as many and all others SHORT, in the config in force.
        """
        dim, size, scale = 128, 16, 0.088
        kv_heads = kv_heads or heads
        vector = dim + 8 if quantized else 2 * dim
        spread = [1.8 - 1.6 * i / (sequences - 1) for i in range(sequences)] if sequences > 1 else [1.0]
        if uneven:
            spread = [1.0] + [SHORT / max(contexts)] * (sequences - 1)
        held = [-(-int(max(contexts) * share) // size) for share in spread]  # blocks of each
        nbytes = [2 * sum(int(context * share) for share in spread) * kv_heads * vector for context in contexts]
        count = 2 if self.compiling else max(2, -(-ROTATED_BYTES // min(nbytes)))
        caches = [random_cache(sum(held), size, kv_heads, dim, quantized) for _ in range(min(count, 24))]
        tables = torch.zeros(sequences, max(held), dtype=torch.int32, device="cuda")
        tables[(torch.arange(max(held)) < torch.tensor(held)[:, None]).cuda()] = torch.randperm(sum(held)).int().cuda()
        lengths = torch.zeros(sequences, dtype=torch.int64, device="cuda")
        qkv = normal(sequences, heads + 2 * kv_heads, dim)
        cos, sin = torch.rand(sequences, 1, dim, device="cuda"), torch.rand(sequences, 1, dim, device="cuda")
        slots = torch.zeros(sequences, dtype=torch.int64, device="cuda")
        new = NewTokens(cos, sin, None, None, 1e-6, slots)
        arrived = arrival_counters(sequences * heads, qkv.device)
        out = torch.empty(sequences, heads * dim, dtype=qkv.dtype, device="cuda")

        def at(context: int) -> None:
            lengths.copy_(torch.tensor([int(context * share) for share in spread]))
            last = lengths - 1
            slots.copy_(tables.gather(1, (last // size)[:, None])[:, 0].long() * size + last % size)

        def step(cache: LayerCache, parts: Parts) -> torch.Tensor:
            return decode_step_attention(qkv, new, cache, tables, lengths, scale, out, parts=parts)

        def parts_for(config: Config) -> Parts:
            parts = contexts_in_parts(lengths, heads, caches[0], arrived, config)
            torch.cuda.synchronize()  # what follows begins by reading them
            return parts

        def run_at(context: int, config: Config) -> float:
            at(context)
            parts = parts_for(config)
            return self.timer([partial(step, one, parts) for one in caches])

        def run(config: Config) -> float:
            return sum(run_at(context, config) / size for context, size in zip(contexts, nbytes, strict=True))

        kind = (1 if quantized else 2, dim)
        kernel, configs = "decode_heads", attention_configs(quantized, sequences)
        shape: tuple[int, ...] = (*kind, sequences * heads)
        if kv_heads != heads:
            kernel, shape, configs = "decode_attention", (*kind, heads // kv_heads, sequences), group_configs(sequences)
        config = tuning.tuned(kernel, shape)
        if uneven:
            run(config)
        else:
            config, _ = self.choose(kernel, shape, configs, run)
        if self.compiling:
            return
        at(max(contexts) - 3)
        out.fill_(torch.nan)
        got = step(caches[0], parts_for(config))
        q = rotary_cache_reference(qkv[:2], cos[:2], sin[:2], None, None, 1e-6, slots[:2], caches[0])
        wanted = decode_attention_reference(q, caches[0], tables, lengths[:2], scale)
        error = relative_error(got[:2], wanted)
        for context, count_of_bytes in zip(contexts, nbytes, strict=True):
            us = run_at(context, config)
            name = f"attention {'int8' if quantized else 'bf16'} {heads}"
            name += "" if kv_heads == heads else f"/{kv_heads}"
            lengths_of = f"1 x {context}, {sequences - 1} x {SHORT}" if uneven else f"{sequences} x {context}"
            self.add(name, lengths_of, us, count_of_bytes, error, config)

    def record(self) -> dict[str, Any]:
        return record_head("gpu kernels") | {
            "limits": self.limits,
            "rows": [asdict(row) for row in self.rows],
            "failures": self.failures,
        }

    def show(self) -> None:
        print(", ".join(f"{name} {value / 1e12:.2f} T/s" for name, value in self.limits.items()))
        for row in self.rows:
            config = " ".join(f"{name}={value}" for name, value in row.config.items())
            print(
                f"{row.kernel:22} {row.shape:14} {row.us:8.1f} us {row.gb_s:6.0f} GB/s "
                f"{row.share:5.0%} error {row.error:.1e} {config}"
            )


def empty_blocked(bits: int, inputs: int, out: int) -> BlockedWeight:
    """For compiling only."""
    codes = torch.empty(out, inputs * bits // 32, dtype=torch.int32, device="cuda")
    return BlockedWeight(
        bits, 128, 128, out, inputs, codes, torch.empty(out, inputs // 128, device="cuda").half(), None
    )


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def random_plain(inputs: int, out: int) -> torch.Tensor:
    return normal(out, inputs).mul_(inputs**-0.5)


def operands(
    rows: int, inputs: int, outputs: int, normed: bool, added: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    norm = normal(inputs) * 0.1 + 1 if normed else None
    residual = normal(rows, outputs) if added else None
    return normal(rows, inputs), norm, residual, torch.empty(rows, outputs, device="cuda", dtype=torch.bfloat16)


def random_cache(blocks: int, size: int, kv_heads: int, dim: int, quantized: bool) -> LayerCache:
    key, value = normal(blocks, size, kv_heads, dim), normal(blocks, size, kv_heads, dim)
    if not quantized:
        return LayerCache(key, value)
    (key, key_affine), (value, value_affine) = quantize_kv(key), quantize_kv(value)
    return LayerCache(key, value, key_affine, value_affine)


def measure(bench: Bench, models: list[str], only: list[str], seconds: float) -> None:
    """The parts of PARTS that are asked for, the most wanted first; none is begun after `seconds`."""
    began = time.perf_counter()
    parts: list[tuple[Any, ...]] = []
    if "int4" in only:
        parts += [(bench.int_products, 4, 1, SHAPES[model]) for model in models]
    if "attention" in only:
        parts += [
            (bench.attention, q, HEADS[model], 1, (1024, 8192))
            for model in models
            if model in HEADS
            for q in (False, True)
        ]
        for count in (64, 256) if "Qwen-7B" in models else ():
            parts += [(bench.attention, q, 32, count, (800,)) for q in (False, True)]
    if "int8" in only:
        parts += [(bench.int_products, 8, 1, SHAPES[model]) for model in models]
    if "bf16" in only:
        parts += [(bench.bf16_products, 1, SHAPES[model]) for model in models if model in ("Qwen-7B", "Qwen-14B")]
        parts += [(bench.bf16_products, 1, [(*shape, False, True, False)]) for shape in VOCABULARIES]
    if "rows" in only:
        for rows in (2, 4):
            for model in models[:2]:
                parts += [(bench.int_products, bits, rows, SHAPES[model]) for bits in (4, 8)]
    if "groups" in only:
        for count in (1, 16, 64, 256):
            parts += [(bench.attention, q, heads, count, (800,), few) for heads, few in GROUPS for q in (False, True)]
    if "uneven" in only:
        for heads, few, count in ((32, 32, 64), *((heads, few, 16) for heads, few in GROUPS)):
            parts += [(bench.attention, q, heads, count, (16_384,), few, True) for q in (False, True)]
    for what, *arguments in parts:
        if time.perf_counter() - began < seconds:
            bench.attempt(what, *arguments)
        else:
            bench.failures.append(f"no time: {what.__name__}{arguments[:2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record and the configs")
    parser.add_argument("--keep", action="store_true", help="measure the configs in force instead of choosing new ones")
    parser.add_argument("--compile", metavar="I/N", help="only compile the I-th of N shares of what would be measured")
    parser.add_argument("--models", default="Qwen-7B,Qwen-1.8B,Qwen-14B,Qwen-72B", help="whose shapes")
    parser.add_argument(
        "--parts",
        default=PARTS,
        help="what is measured; rows: int4 and int8 with 2 and 4 rows; groups: attention of later models; "
        "uneven: of one long sequence among short ones",
    )
    parser.add_argument("--seconds", type=float, default=145, help="in all; parts that would begin later are left out")
    options = parser.parse_args()
    need_gpu()
    began = time.perf_counter()
    torch.manual_seed(0)
    models, only = options.models.split(","), options.parts.split(",")
    if options.compile:
        measure(Bench(True, Compiler(options.compile)), models, only, options.seconds)
        return
    arguments = ["--out", str(options.out), "--models", options.models, "--parts", options.parts]
    compiling = 0.0 if options.keep else compile_beside("gpu_kernels", arguments, options.seconds * 0.55)
    bench = Bench(not options.keep)
    measure(bench, models, only, options.seconds - 5 - (time.perf_counter() - began))
    options.out.mkdir(parents=True, exist_ok=True)
    record = bench.record() | {"seconds": {"compiling": compiling, "all": time.perf_counter() - began}}
    (options.out / "gpu-kernels.json").write_text(json.dumps(record, indent=1) + "\n")
    tables = {"cards": [torch.cuda.get_device_name()], "configs": tuning.in_force() | bench.configs}
    (options.out / "tuned.json").write_text(tuning.as_text(tables))
    bench.show()
    print(f"{compiling:.0f} s compiling, {time.perf_counter() - began:.0f} s in all; failures: {bench.failures}")


if __name__ == "__main__":
    main()
