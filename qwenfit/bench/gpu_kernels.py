"""Check, tune and time the Triton kernels on this GPU: `python -m qwenfit.bench.gpu_kernels --out FOLDER [--tune]`.

Every kernel is compared with its float32 reference at the shapes of real models, then timed by replaying a CUDA graph
of launches that walk over more than 200 MB of weights, so that no cache holds them. The table gives each kernel's
bytes, its rate, and that rate's share of what plain reading reaches on the card. Data is random, never zeros.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

from qwenfit.kernels.attention import LayerCache
from qwenfit.kernels.kv_quant import quantize_kv
from qwenfit.kernels.triton import tuning
from qwenfit.kernels.triton.bf16_matvec import bf16_matvec, bf16_matvec_reference
from qwenfit.kernels.triton.decode_attention import decode_attention, decode_attention_reference
from qwenfit.kernels.triton.int_matmul import dequantised, int_matmul
from qwenfit.kernels.triton.int_matvec import BlockedWeight, int_matvec, int_matvec_reference
from qwenfit.kernels.triton.launch import device_limits
from qwenfit.kernels.triton.layout import pack_codes

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
HEADS = [(4096, 151936), (2048, 151936)]
ROTATED_BYTES = 400 << 20


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


def random_blocked(bits: int, inputs: int, out: int) -> BlockedWeight:
    q = torch.randint(0, 2**bits, (out, inputs), dtype=torch.uint8, device="cuda")
    deviation = ((4.0**bits - 1) / 12) ** 0.5
    scales = (torch.rand(out, inputs // 128, device="cuda") + 0.5).half() / deviation / inputs**0.5
    return BlockedWeight(bits, 128, 128, out, inputs, pack_codes(q, bits, 128), scales, None)


def copies(make: Callable[[], Any], nbytes: int) -> list[Any]:
    """Enough equal-sized weights that reading them all passes the cache by."""
    return [make() for _ in range(max(2, -(-ROTATED_BYTES // nbytes)))]


def int_configs(bits: int, inputs: int, rows: int) -> Iterable[Config]:
    cores = torch.cuda.get_device_properties().multi_processor_count
    whole = 1 << (inputs * bits // 32 - 1).bit_length()
    for words in sorted({512, whole}):
        for warps in {max(1, words // 256), max(1, words // 128)}:
            for tile in (4, 8, 16):
                for resident in (8, 16, 24):
                    if tile * rows <= 32 and warps <= 16:
                        programs = cores * max(1, resident // warps)
                        yield {"rows": tile, "words": words, "warps": warps, "programs": programs}


def bf16_configs(rows: int) -> Iterable[Config]:
    for tile in (2, 4, 8):
        for columns, warps in ((512, 2), (1024, 4), (2048, 8)):
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


class Bench:
    def __init__(self, tune: bool, timer: Callable[[list[Callable[[], object]]], float] = time_us) -> None:
        self.tune = tune
        self.timer = timer
        self.limits = device_limits() if timer is time_us else {"read": 1.0}
        self.rows: list[Row] = []
        self.configs: dict[str, Config] = {}

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
            weights = copies(partial(random_blocked, bits, inputs, out), nbytes)
            x, norm, residual, y = operands(rows, inputs, out // 2 if gated else out, normed, added)

            def run(config: Config, w: Any = weights, a: Any = (x, norm, residual, y), g: bool = gated) -> float:
                return self.timer(
                    [partial(int_matvec, a[0], one, None, a[2], a[1], 1e-6, g, a[3], config) for one in w]
                )

            config, us = self.choose("int_matvec", (bits, inputs, out, rows), int_configs(bits, inputs, rows), run)
            got = int_matvec(x, weights[0], None, residual, norm, 1e-6, gated, y.fill_(torch.nan), config)
            error = relative_error(got, int_matvec_reference(x, weights[0], None, residual, norm, 1e-6, gated))
            self.add(f"int{bits} x{rows}", f"{inputs}->{out}", us, nbytes, error, config)

    def bf16_products(self, rows: int, shapes: Iterable[tuple[int, int, bool, bool, bool]]) -> None:
        for inputs, out, gated, normed, added in shapes:
            nbytes = inputs * out * 2
            weights = copies(partial(random_plain, inputs, out), nbytes)
            x, norm, residual, y = operands(rows, inputs, out // 2 if gated else out, normed, added)

            def run(config: Config, w: Any = weights, a: Any = (x, norm, residual, y), g: bool = gated) -> float:
                return self.timer(
                    [partial(bf16_matvec, a[0], one, None, a[2], a[1], 1e-6, g, None, a[3], config) for one in w]
                )

            config, us = self.choose("bf16_matvec", (inputs, out, rows), bf16_configs(rows), run)
            got = bf16_matvec(x, weights[0], None, residual, norm, 1e-6, gated, None, y.fill_(torch.nan), config)
            error = relative_error(got, bf16_matvec_reference(x, weights[0], None, residual, norm, 1e-6, gated))
            self.add(f"bf16 x{rows}", f"{inputs}->{out}", us, nbytes, error, config)
            plain = self.timer([partial(torch.nn.functional.linear, x, one) for one in weights])
            self.add(f"cuBLAS bf16 x{rows}", f"{inputs}->{out}", plain, nbytes, 0.0)

    def matmuls(self, bits: int, inputs: int, out: int, rows: int) -> None:
        nbytes = inputs * out * bits // 8 + inputs // 128 * out * 2
        weights = copies(lambda: random_blocked(bits, inputs, out), nbytes)
        x, _, _, y = operands(rows, inputs, out, False, False)
        tile_m = min(64, max(16, triton.next_power_of_2(rows)))
        configs = [
            {"m": tile_m, "rows": tile, "words": words * bits // 4, "warps": warps}
            for tile, words, warps in ((32, 32, 4), (64, 32, 4), (64, 16, 4), (128, 16, 8), (64, 64, 8))
        ]

        def run(config: Config) -> float:
            return self.timer([partial(int_matmul, x, one, None, y, config) for one in weights])

        config, us = self.choose("int_matmul", (bits, inputs, out, rows), configs, run)
        reference = int_matvec_reference(x, weights[0])
        error = relative_error(int_matmul(x, weights[0], None, y.fill_(torch.nan), config), reference)
        self.add(f"int{bits} dot x{rows}", f"{inputs}->{out}", us, nbytes, error, config)
        scratch = torch.empty(out, inputs, dtype=torch.bfloat16, device="cuda")

        def unpack_and_multiply(weight: BlockedWeight) -> torch.Tensor:
            return torch.nn.functional.linear(x, dequantised(weight, x.dtype, scratch))

        us = self.timer([partial(unpack_and_multiply, one) for one in weights])
        error = relative_error(torch.nn.functional.linear(x, dequantised(weights[0], x.dtype)), reference)
        self.add(f"int{bits} unpack+cuBLAS x{rows}", f"{inputs}->{out}", us, nbytes, error)

    def attention(self, quantized: bool, heads: int, kv_heads: int, batch: int, context: int) -> None:
        dim, size = 128, 16
        blocks = -(-context // size) * batch
        vector = dim + 8 if quantized else 2 * dim
        nbytes = 2 * batch * context * kv_heads * vector
        caches = copies(lambda: random_cache(blocks, size, kv_heads, dim, quantized), nbytes)
        tables = torch.randperm(blocks, device="cuda").int().view(batch, -1)
        lengths = torch.full((batch,), context, device="cuda")
        q = normal(batch, heads, dim)
        out = torch.empty(batch, heads * dim, dtype=q.dtype, device="cuda")

        def run(config: Config) -> float:
            return self.timer(
                [partial(decode_attention, q, one, tables, lengths, 0.088, out, None, config) for one in caches]
            )

        configs = [{"tokens": tokens, "warps": warps} for tokens in (16, 32, 64) for warps in (2, 4)]
        shape = (1 if quantized else 2, dim, heads // kv_heads, batch)
        config, us = self.choose("decode_attention", shape, configs, run)
        got = decode_attention(q, caches[0], tables, lengths, 0.088, out.fill_(torch.nan), None, config)
        error = relative_error(got[:2], decode_attention_reference(q[:2], caches[0], tables, lengths[:2], 0.088))
        name = f"attention {'int8' if quantized else 'bf16'} {heads}/{kv_heads}"
        self.add(name, f"{batch} x {context}", us, nbytes, error, config)

    def record(self) -> dict[str, Any]:
        return {
            "kind": "gpu kernels",
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": "python -m qwenfit.bench.gpu_kernels " + " ".join(sys.argv[1:]),
            "hardware": torch.cuda.get_device_name(),
            "versions": {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda},
            "limits": self.limits,
            "rows": [asdict(row) for row in self.rows],
        }

    def show(self) -> None:
        print(", ".join(f"{name} {value / 1e12:.2f} T/s" for name, value in self.limits.items()))
        for row in self.rows:
            config = " ".join(f"{name}={value}" for name, value in row.config.items())
            print(
                f"{row.kernel:22} {row.shape:14} {row.us:8.1f} us {row.gb_s:6.0f} GB/s "
                f"{row.share:5.0%} error {row.error:.1e} {config}"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record and the configs")
    parser.add_argument(
        "--tune", action="store_true", help="measure a list of configs for each shape and keep the best"
    )
    parser.add_argument("--compile", metavar="I/N", help="only compile the I-th of N shares of what would be measured")
    parser.add_argument("--quick", action="store_true", help="7B shapes and one row only")
    options = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(options.tune, Compiler(options.compile) if options.compile else time_us)
    models = ["Qwen-7B"] if options.quick else list(SHAPES)
    for model in models:
        for bits in (4, 8):
            for rows in (1,) if options.quick else (1, 2, 4):
                bench.int_products(bits, rows, SHAPES[model])
        for rows in (1,) if options.quick else (1, 4, 8):
            bench.bf16_products(rows, SHAPES[model])
    bench.bf16_products(1, [(*head, False, True, False) for head in HEADS[: len(models)]])
    for bits in (4, 8):
        for rows in (8, 16, 64, 256):
            bench.matmuls(bits, 4096, 22016, rows)
    for quantized in (False, True):
        bench.attention(quantized, 32, 32, 1, 1024)
        bench.attention(quantized, 32, 32, 1, 8192)
        bench.attention(quantized, 32, 32, 64, 1024)
        bench.attention(quantized, 28, 4, 16, 2048)
    if options.compile:
        return
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu-kernels.json").write_text(json.dumps(bench.record(), indent=1) + "\n")
    if options.tune:
        tables = {"cards": [torch.cuda.get_device_name()], "configs": bench.configs}
        (options.out / "tuned.json").write_text(json.dumps(tables, indent=1) + "\n")
    bench.show()


if __name__ == "__main__":
    main()
