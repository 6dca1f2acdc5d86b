"""Every number in the plan that was fitted, and every one that was measured or read elsewhere, with its source.

FITTED constants were calibrated on the guide's inference table, its two KV cache tables and the 42 finetuning
cells that the official README confirms, and (one of them) on vLLM measured on an H100. There are at most ten of
them over all stacks, and none belongs to a single row. READ constants come from a measurement of one run, a
vendor's documentation or the source code of the software planned for; they were not adjusted to the guide.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
GB = 10**9


@dataclass(frozen=True)
class Constant:
    """A named number of the model: `value` in `unit`, what it means physically, and the data it came from."""

    name: str
    value: float
    unit: str
    meaning: str
    data: str


FITTED: dict[str, Constant] = {
    c.name: c
    for c in (
        Constant(
            "scratch_2023",
            0.35 * GIB,
            "bytes",
            "buffers that the 2023 inference software holds beside weights and cache when it runs GPTQ layers "
            "(dequantized copies, kernel buffers) or attention without FlashAttention",
            "guide/inference.csv, Int8 and Int4 rows; guide/kv_cache_batch.csv, kv_cache_length.csv",
        ),
        Constant(
            "train_overhead_2023",
            2.2 * GB,
            "bytes",
            "what a finetuning process holds beyond its tensors: CUDA context, libraries, cached blocks",
            "guide/finetune.csv, the 42 confirmed cells",
        ),
        Constant(
            "host_decode_2023",
            0.785e-3,
            "s per layer and step",
            "time the host needs to launch one layer's kernels from Python, bf16 and Int8 layers",
            "guide/inference.csv, bf16 and Int8 rows of 1.8B, 7B, 14B",
        ),
        Constant(
            "host_decode_2023_int4",
            0.62e-3,
            "s per layer and step",
            "the same with the fused Int4 kernels of AutoGPTQ (ExLlama), which launch less",
            "guide/inference.csv, Int4 rows of 1.8B, 7B, 14B",
        ),
        Constant(
            "bandwidth_share_2023",
            0.60,
            "of peak",
            "share of the card's peak bandwidth that its matrix-vector products reach",
            "guide/inference.csv, 72B bf16",
        ),
        Constant(
            "unpack_2023",
            0.75e-12,
            "s per weight (A100)",
            "time AutoGPTQ's kernels take to unpack one quantized weight, on top of reading it",
            "guide/inference.csv, 72B Int8 and Int4",
        ),
        Constant(
            "host_train_2023",
            5.0e-3,
            "s per layer and micro-batch",
            "host time for one layer's forward, recomputation and backward with adapters",
            "guide/finetune.csv, LoRA cells of 1.8B and 7B at 256 tokens",
        ),
        Constant(
            "host_zero3_2023",
            6.0e-3,
            "s per layer and micro-batch",
            "host time of DeepSpeed ZeRO-3's hooks that gather and release each module's parameters",
            "guide/finetune.csv, full-parameter cells of 1.8B",
        ),
        Constant(
            "activation_traffic",
            1000.0,
            "bytes per token, layer and hidden unit",
            "memory traffic of the element-wise work in one layer's forward, recomputation and backward; "
            "adapters with dropout add as much again",
            "guide/finetune.csv, LoRA and full-parameter cells at 2048 tokens and more",
        ),
        Constant(
            "vllm_layer_overhead",
            0.058e-3,
            "s per layer and step",
            "gaps between kernels and small kernels in vLLM's decode step under CUDA graphs",
            "vLLM 0.26 on one H100 80GB: Qwen-7B bf16 151.7 tokens/s, Qwen-1.8B bf16 409.0 tokens/s",
        ),
    )
}

READ: dict[str, Constant] = {
    c.name: c
    for c in (
        Constant(
            "matmul_share",
            0.79,
            "of peak",
            "share of the dense peak that a large matrix product reaches",
            "measured: 8192^3 bf16 product, 781 of 989 TFLOP/s on an H100 80GB",
        ),
        Constant(
            "prefill_share",
            0.75,
            "of the matrix product's speed",
            "a whole prompt against the bare products: norms, attention, small layers",
            "vLLM 0.26 on one H100: 2048-token prompt of Qwen-7B in 49.1 ms against 36 ms of products",
        ),
        Constant(
            "cuda_context",
            0.5 * GB,
            "bytes",
            "CUDA context, kernels and libraries outside the allocator",
            "transformers 5.17, Qwen-7B bf16 on an H100: 18.59 GB process against 17.66 GB reserved, half of it "
            "on older cards and drivers",
        ),
        Constant(
            "cuda_context_hopper",
            0.88 * GB,
            "bytes",
            "the same on compute capability 9.0",
            "0.84 GB beyond what is allocated in measurements/guide-h100-*.json, 0.93 GB with transformers 5.17 there",
        ),
        Constant(
            "cpu_process",
            0.28 * GB,
            "bytes",
            "a CPU process beside weights and cache: the interpreter, torch, scratch",
            "qwenfit on two Zen 3 cores, Qwen2.5-0.5B int4: 0.28 GB unaccounted",
        ),
        Constant(
            "growing_cache_reserve",
            0.066,
            "of allocated",
            "blocks a growing cache leaves cached and unused in torch's allocator",
            "transformers 5.17, Qwen-7B bf16, 2048 tokens: 17.66 GB reserved against 16.57 GB allocated",
        ),
        Constant(
            "cublas_workspace",
            8_519_680.0,
            "bytes",
            "cuBLAS workspace per handle and stream before Hopper (2 x 4096 + 8 x 16 KiB)",
            "PyTorch CUDA semantics, CUBLAS_WORKSPACE_CONFIG default :4096:2:16:8",
        ),
        Constant(
            "cublas_workspace_hopper",
            32.0 * 2**20,
            "bytes",
            "cuBLAS workspace on compute capability 9.0",
            "comment in PyTorch's CUDABlas, 32 MiB on sm_90",
        ),
        Constant(
            "zero2_buckets",
            2 * 2e8 * 2,
            "bytes",
            "DeepSpeed's reduce and all-gather buckets of the official ZeRO-2 settings",
            "QwenLM/Qwen finetune/ds_config_zero2.json: reduce_bucket_size = allgather_bucket_size = 2e8 elements",
        ),
        Constant(
            "zero3_live_parameters",
            1e9,
            "parameters",
            "parameters that ZeRO-3 keeps gathered (stage3_max_live_parameters), 2 bytes each",
            "QwenLM/Qwen finetune/ds_config_zero3.json",
        ),
        Constant(
            "zero3_sub_group",
            1e9,
            "parameters",
            "parameters that ZeRO-3 updates at once; the update holds two float32 temporaries of them",
            "QwenLM/Qwen finetune/ds_config_zero3.json (sub_group_size); torch AdamW, foreach form",
        ),
        Constant(
            "gptq_dequantize_bytes",
            5.0,
            "bytes per weight of the largest layer",
            "temporaries of AutoGPTQ's PyTorch dequantization: the int32 shift and its int8 copy",
            "AutoGPTQ 0.7.1 nn_modules/qlinear/qlinear_cuda_old.py",
        ),
        Constant(
            "gptq_dequantize_traffic",
            21.0,
            "bytes per weight and pass",
            "the same chain reads and writes 16.5 bytes per weight, at 0.8 of the speed of a plain read",
            "AutoGPTQ 0.7.1 nn_modules/qlinear/qlinear_cuda_old.py, operations counted",
        ),
        Constant(
            "vllm_unpack",
            0.55e-12,
            "s per weight (A100)",
            "time vLLM's Int4 kernels take beyond reading the weights",
            "vLLM 0.26, Qwen-7B Int4 on one H100: 220.3 tokens/s, 4.54 ms against 3.5 ms for bytes and layer overhead",
        ),
        Constant(
            "nccl_latency",
            30e-6,
            "s",
            "one small all-reduce between the GPUs of a host",
            "NCCL tests, small messages over NVLink, 20 to 40 us",
        ),
        Constant(
            "link_share",
            0.8,
            "of the link",
            "share of a link's one-direction bandwidth that large collectives reach",
            "NCCL tests: about 230 GB/s bus bandwidth of 300 GB/s on A100 NVLink",
        ),
    )
}

# What this project's own engine was measured to do on a GPU: refitted by `python -m qwenfit.bench.refit` whenever a
# record in measurements/ is newer than the kernels.
_DECODE = "measurements/guide-h100-*.json, 33 runs (with rows-h200-*.json and gpu-decode-h200-5.json), bench/refit.py"
_LIMIT = "measurements/rows-h200-*.json and gpu-decode-h200-5.json: what the shares come to there, by bench/refit.py"
_CORES = "gpu-decode-h200-12 and gpu-search-h200-*: the steps of 38 models and precisions within 11 %"
_CPU = (
    "measurements/decode-amd-epyc-*2026-11-24*, compare-amd-epyc-*: two Zen 3 cores, kernels that fetch nothing ahead"
)
_CPU_TILES = "measurements/prefill-*.json: 0.5B to 3B, 32 to 512 tokens, on two Emerald Rapids cores"
_CPU_TRAIN = "one step of LoRA on Qwen2.5-0.5B, 256 tokens, bf16 and fp32, one core of Emerald Rapids, by its profile"
_ROWS = "gpu-decode-h200-8 to -11, gpu-search-h200-*-x2, gpu-tiles-h200 (steps of 2 to 256 sequences); above: estimated"
_MANY = "gpu-decode-h200-15, gpu-attention-late-h200 (150 steps of 4 to 256 requests, 19 of 20 within 10 %)"
# Bytes/s at which weights are multiplied at most with up to so many requests at once: what a Hopper's cores take. Many
# unpack int4 and int8 weights first (kernels/choice.py).
ROWS_LIMITS = {  # by kind of READ_KINDS (planning/stack.py)
    "plain_rows": {128: 3.6e12, 256: 2.25e12, 512: 1.2e12},
    "int4": {
        2: 2.3e12, 4: 2.05e12, 8: 2.2e12, 16: 2.1e12, 32: 1.55e12, 64: 1.1e12, 128: 0.63e12, 256: 0.4e12,
        384: 0.28e12, 512: 0.2e12,
    },
    "int8": {
        2: 2.78e12, 4: 2.94e12, 8: 3.16e12, 16: 3.16e12, 32: 2.75e12, 64: 1.7e12, 128: 0.95e12, 256: 0.58e12,
        512: 0.4e12,
    },
}  # fmt: skip
MEASURED: dict[str, Constant] = {
    c.name: c
    for c in (
        *(
            Constant(
                f"qwenfit_rows_{kind}_{rows}",
                limit,
                "bytes/s",
                f"{'16-bit' if kind == 'plain_rows' else kind} weights with {rows} requests at once",
                _ROWS,
            )
            for kind, limits in ROWS_LIMITS.items()
            for rows, limit in limits.items()
        ),
        Constant(
            "qwenfit_rows_gap",
            11.5e-6,
            "s per layer and step",
            "arranging activations for int4 and int8 weights, from 3 requests on",
            _ROWS,
        ),
        Constant(
            "qwenfit_plain_rows_gap",
            7e-6,
            "s per layer and step",
            "16-bit weights from 3 requests on, beyond their bytes",
            "gpu-decode-h200-8 and -11: 0.5B to 7B",
        ),
        Constant(
            "qwenfit_codes_gap",
            5e-6,
            "s per layer and step",
            "attention to an int8 cache of more than 32 requests, or whose heads share keys, beyond its bytes",
            "gpu-decode-h200-6 and -8: Qwen2.5-7B with 1, 2 and 16 requests, int8 against bf16 cache; " + _MANY,
        ),
        Constant(
            "qwenfit_shared_gap",
            1.4e-6,
            "s per layer and step",
            "joining the parts of attention where heads share keys, for one or two requests: a launch of its own",
            "gpu-decode-h200-12: Qwen2.5 and Qwen3 of 0.5B to 72B",
        ),
        Constant(
            "qwenfit_rows_speed_error",
            0.25,
            "relative",
            "half-width of the speed interval of several requests with int4 or int8 weights, and of more than 256",
            "the same records, within 10 %; no card but a Hopper was measured, nor more than 256",
        ),
        Constant("qwenfit_read_plain", 0.983, "of a plain read", "16-bit weights in a decode step", _DECODE),
        Constant(
            "qwenfit_read_plain_rows", 0.88, "of a plain read", "16-bit weights for 2 to 16 requests at once", _ROWS
        ),
        Constant("qwenfit_read_plain_64", 0.90, "of a plain read", "16-bit weights for 64 requests at once", _MANY),
        Constant("qwenfit_read_int8", 0.963, "of a plain read", "int8 weights in a decode step", _DECODE),
        Constant("qwenfit_read_int4", 0.912, "of a plain read", "int4 weights in a decode step", _DECODE),
        Constant("qwenfit_read_cache", 0.876, "of a plain read", "a 16-bit KV cache in a decode step", _DECODE),
        Constant("qwenfit_read_cache_int8", 0.762, "of a plain read", "an int8 KV cache in a decode step", _DECODE),
        Constant(
            "qwenfit_read_cache_rows", 0.973, "of a plain read", "a 16-bit KV cache of more than 7 requests", _MANY
        ),
        Constant(
            "qwenfit_read_cache_int8_rows", 0.90, "of a plain read", "an int8 KV cache of more than 3 requests", _MANY
        ),
        Constant("qwenfit_limit_int8", 4.0e12, "bytes/s", "int8 weights on faster memory: a Hopper's cores", _CORES),
        Constant("qwenfit_limit_int4", 3.72e12, "bytes/s", "int4 weights on faster memory: a Hopper's cores", _CORES),
        Constant("qwenfit_limit_cache", 3.73e12, "bytes/s", "a 16-bit cache on faster memory", _LIMIT),
        Constant("qwenfit_limit_cache_int8", 2.71e12, "bytes/s", "an int8 cache on faster memory", _LIMIT),
        Constant("qwenfit_limit_cache_rows", 4.2e12, "bytes/s", "a 16-bit cache of many on faster memory", _MANY),
        Constant("qwenfit_limit_cache_int8_rows", 3.8e12, "bytes/s", "an int8 cache of many on faster memory", _MANY),
        Constant(
            "qwenfit_layer_gap",
            11.6e-6,
            "s per layer and step",
            "what the kernels of a layer take beyond their bytes, in a CUDA graph",
            _DECODE,
        ),
        Constant(
            "qwenfit_step_host",
            0.031e-3,
            "s per step",
            "scheduling, copying the step's numbers, sampling: what the engine adds to the graph",
            _DECODE,
        ),
        Constant(
            "qwenfit_prefill_share",
            0.87,
            "of the matrix product's speed",
            "a whole prompt against the bare products: norms, attention, small layers",
            "measurements/gpu-engine-h100.json: 44.1 ms for 2048 tokens of Qwen-7B bf16",
        ),
        Constant(
            "qwenfit_cpu_read",
            0.85,
            "of a plain read",
            "weights and cache in a decode step on a CPU, in any precision",
            _CPU,
        ),
        Constant(
            "qwenfit_cpu_read_ahead",
            1.2,
            "of a plain read",
            "the same on few cores with AVX-512: their prefetcher leaves a part of the memory's speed to a plain read",
            "measurements/decode-intel-*.json, decode-amd-epyc-*2026-11-30t00*: two cores of Emerald Rapids, of Zen 5",
        ),
        Constant(
            "qwenfit_cpu_read_ahead_avx2",
            0.96,
            "of a plain read",
            "the same on few cores with AVX2 alone",
            "measurements/decode-amd-epyc-*-2026-11-30t21*: 0.5B to 7B on two Zen 3 cores, 21 runs",
        ),
        Constant(
            "qwenfit_cpu_layer_gap",
            0.3e-3,
            "s per layer and step",
            "what a layer takes on a CPU beyond its bytes: attention, norms, and the calls between kernels",
            "measurements/decode-*.json on CPUs: 0.14 ms on Zen 5, 0.5 on Zen 3 and on Emerald Rapids, two cores each",
        ),
        Constant(
            "qwenfit_cpu_prefill_share",
            0.79,
            "of the matrix product's speed",
            "a whole prompt on a CPU against one large product",
            _CPU,
        ),
        Constant(
            "qwenfit_cpu_tiles_share",
            0.18,
            "of peak",
            "share of AMX's peak that torch's bf16 products reach: they lay operands out anew and fetch tiles from L2",
            "2048^3 in 8.9 ms, 1.94 of 10.6 TFLOP/s, two quiet Emerald Rapids cores, torch 2.13 with oneDNN 3.12",
        ),
        Constant(
            "qwenfit_cpu_few_rows_share",
            1.0,
            "of the float32 product's speed",
            "2 to 4 requests decoding at once on a CPU: what each but the first adds",
            "measurements/decode-intel-*.json: Qwen2.5-0.5B int4, 1 and 4 requests",
        ),
        Constant(
            "qwenfit_cpu_rows_share",
            0.4,
            "of the float32 product's speed",
            "more requests at once on a CPU without tiles: what each but the first adds",
            "Qwen2.5-0.5B int4, 8 and 32 requests, two Emerald Rapids cores with AMX and oneDNN held back",
        ),
        Constant(
            "qwenfit_cpu_prefill_tiles",
            0.5,
            "of the matrix product's speed",
            "a whole prompt where AMX multiplies: the products of kernels/tiles.c, attention, norms, small layers",
            _CPU_TILES,
        ),
        Constant(
            "qwenfit_cpu_prompt_gap",
            1e-3,
            "s per layer and prompt",
            "what a layer of a prompt adds there to the gap of a decode step: torch's attention, larger copies",
            _CPU_TILES,
        ),
        Constant(
            "qwenfit_cpu_tile_unpack",
            0.15e-9,
            "s per weight and core",
            "an int8 or int4 weight made bf16 in a tile, once for every 512 rows of a prompt",
            _CPU_TILES,
        ),
        Constant(
            "qwenfit_cpu_speed_error",
            0.2,
            "of the speed",
            "how far decoding on a CPU is from its plan, other users of the machine included",
            "measurements/decode-*.json on CPUs: most within 0.2",
        ),
        Constant(
            "qwenfit_cpu_tiles_quiet",
            0.75,
            "times as long",
            "a prompt where nobody else uses the machine",
            _CPU_TILES,
        ),
        Constant(
            "qwenfit_cpu_tiles_busy",
            1.8,
            "times as long",
            "a prompt while AMX is slow: guests were seen to get a third of its speed for seconds at a time",
            _CPU_TILES,
        ),
        Constant(
            "qwenfit_cpu_wide_train",
            0.1,
            "of float32's peak",
            "torch's bf16 products with gradients on a CPU without AVX-512, where oneDNN has none",
            "6 to 8 GFLOP/s a core against 66 of AVX2 at 2.1 GHz: 512^3, oneDNN held to AVX2, torch 2.13",
        ),
        Constant(
            "qwenfit_cpu_train_share",
            0.8,
            "of the matrix product's speed",
            "products of a few hundred rows in a finetuning step on a CPU, attention and loss included",
            _CPU_TRAIN,
        ),
        Constant(
            "qwenfit_cpu_train_tiles",
            0.33,
            "of the matrix product's speed",
            "the same where AMX multiplies: operands laid out anew weigh more against fewer rows",
            _CPU_TRAIN,
        ),
        Constant(
            "qwenfit_cpu_train_traffic",
            0.25,
            "of memory bandwidth",
            "work between the products of a finetuning step, which no kernel fuses on a CPU",
            _CPU_TRAIN,
        ),
        Constant(
            "qwenfit_cpu_draw",
            12e-9,
            "s per number",
            "torch draws dropout's numbers on a CPU in one thread",
            "bernoulli_ of 4 M numbers in 46 to 52 ms, Emerald Rapids, torch 2.13",
        ),
        Constant(
            "qwenfit_cpu_train_process",
            0.43 * GB,
            "bytes",
            "a finetuning process beside its tensors: interpreter, torch, and torch._dynamo that checkpointing loads",
            "a network of 0.2 M parameters: 0.239 GB before the first step, 0.431 after the third",
        ),
        Constant(
            "qwenfit_prompt_host",
            1.3e-3,
            "s per prompt",
            "scheduling, copying the prompt's numbers, sampling: what the engine adds to the products",
            "measurements/gpu-engine-h100.json: 11.7 ms for 512 tokens of Qwen-7B bf16, in a CUDA graph",
        ),
    )
}


def fitted(name: str) -> float:
    """The value of a fitted constant, in its unit."""
    return FITTED[name].value


def read(name: str) -> float:
    """The value of a constant read elsewhere, in its unit."""
    return READ[name].value


def measured(name: str) -> float:
    """The value of a constant measured on this project's own engine, in its unit."""
    return MEASURED[name].value
