"""Seconds until an engine is ready where no kernel has been compiled: `python -m qwenfit.bench.gpu_start --out FOLDER`.

Random weights of the model's shapes, made on the GPU, and an empty cache of compiled kernels. `--one-by-one` compiles
each kernel when it is first launched, as it was before kernels were compiled side by side. `--cache FOLDER` keeps what
is compiled there: a second run with it finds everything compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton

from qwenfit.bench.gpu_common import BLOCK_SIZE, greedy, need_gpu, prompt, random_network, record_head, synchronize
from qwenfit.checkpoint.resolve import resolve_model
from qwenfit.engine.llm import LLM
from qwenfit.kernels.triton import launch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument("--model", default="Qwen-7B")
    parser.add_argument("--precision", default="int4", choices=("int4", "int8", "bf16"))
    parser.add_argument("--kv-cache", default="bf16")
    parser.add_argument("--one-by-one", action="store_true")
    parser.add_argument("--cache", help="folder of compiled kernels, kept")
    options = parser.parse_args()
    need_gpu()
    if options.one_by_one:
        launch.compile_side_by_side = lambda launch: None
    compiled: list[dict[str, Any]] = []

    def seen(*, src: Any, cache_hit: bool, times: Any, **_: Any) -> None:
        """What Triton tells of each kernel that it has compiled, or found compiled."""
        if not cache_hit:
            stages = sum(microseconds for _, microseconds in times.lowering_stages)
            compiled.append({"kernel": src.name, "seconds": stages / 1e6, "after": time.perf_counter() - began})

    config = resolve_model(options.model)
    torch.zeros(1, device="cuda")
    with tempfile.TemporaryDirectory() as empty:
        os.environ["TRITON_CACHE_DIR"] = os.environ["XDG_CACHE_HOME"] = options.cache or empty
        bits = None if options.precision == "bf16" else int(options.precision[3:])
        model = random_network(config, torch.bfloat16, "cuda", bits)
        synchronize()
        triton.knobs.compilation.listener = seen
        began = time.perf_counter()
        llm = LLM.from_parts(
            model, config, None, device="cuda", kv_cache=options.kv_cache, block_size=BLOCK_SIZE, num_blocks=4096,
            max_num_seqs=16, max_model_len=4096,
        )  # fmt: skip
        synchronize()
        ready, known = time.perf_counter() - began, len(compiled)
        llm.generate([prompt(300, config, 1)], greedy(16))
        answered = time.perf_counter() - began - ready
    record = (
        record_head("gpu start")
        | {
            "model": options.model,
            "precision": options.precision,
            "kv_cache": options.kv_cache,
            "one_by_one": options.one_by_one,
            "cores": os.cpu_count(),
            "ready_s": ready,
            "kernels": known,
            "compiling_s": sum(each["seconds"] for each in compiled[:known]),  # of all threads together
            "first_answer_s": answered,
            "compiled_after": [each["kernel"] for each in compiled[known:]],
            "compiled": compiled,
        }
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gpu-start.json").write_text(json.dumps(record, indent=1) + "\n")
    how = "one by one" if options.one_by_one else "side by side"
    print(f"{options.model} {options.precision}, {known} kernels {how}: ready after {ready:.1f} s, ", end="")
    print(f"a first answer {answered:.1f} s later")


if __name__ == "__main__":
    main()
