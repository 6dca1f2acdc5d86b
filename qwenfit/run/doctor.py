"""`qwenfit doctor`: versions, devices, which kernels run and why, and the command that adds what is missing."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass

from qwenfit.bench.record import versions
from qwenfit.errors import EXTRA_OF
from qwenfit.hardware import Device, capability_notes
from qwenfit.run.prerequisites import prerequisites

USES = {
    "torch": "running a model",
    "safetensors": "reading weights",
    "tokenizers": "tokenizer.json and GGUF vocabularies",
    "tiktoken": "Qwen-1's vocabulary",
    "jinja2": "chat templates of later models",
    "gguf": "GGUF weights",
    "huggingface_hub": "downloading models",
}
# Kernel choices shown: (kind of weight, rows of activations, what that is).
CASES = (
    ("bf16", 1, "decode"),
    ("int8", 1, "decode"),
    ("int4", 1, "decode"),
    ("bf16", 512, "prompt"),
    ("int8", 512, "prompt"),
    ("int4", 512, "prompt"),
)


@dataclass(frozen=True)
class Check:
    """One finding: `status` is "ok", "missing" or "note"; `fix` is the command that helps."""

    topic: str
    status: str
    text: str
    fix: str = ""


def examine() -> list[Check]:
    """Everything that decides how a model runs here."""
    checks = [Check("versions", "ok", ", ".join(f"{k} {v}" for k, v in versions().items()))]
    checks += [check for device in _devices() for check in _device_checks(device)]
    for package, what in USES.items():
        if importlib.util.find_spec(package) is None:
            fix = f"pip install 'qwenfit[{EXTRA_OF[package]}]'"
            checks.append(Check("package", "missing", f"{package}: {what}", fix))
    if importlib.util.find_spec("torch") is not None:
        checks += _torch_checks()
    return checks + [Check("guide", "ok", line.text) for line in prerequisites()]


def _devices() -> list[Device]:
    from qwenfit.detect import detect_hardware

    return detect_hardware()


def _device_checks(device: Device) -> list[Check]:
    estimate = " (estimated)" if device.bandwidth_estimated else ""
    text = (
        f"{device.name}: {device.usable_bytes / 1e9:.1f} of {device.memory_bytes / 1e9:.1f} GB free, "
        f"{device.bandwidth / 1e9:.0f} GB/s{estimate}, {device.architecture}"
    )
    return [Check("device", "ok", text)] + [Check("device", "note", note) for note in capability_notes(device)]


def _torch_checks() -> list[Check]:
    import torch

    from qwenfit.kernels.choice import choose_kernel

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    checks = [Check("torch", "ok", f"runs on {device}, {torch.get_num_threads()} CPU threads")]
    if not on_gpu and shutil.which("nvidia-smi"):
        checks.append(
            Check(
                "torch", "missing", "a GPU is here, but this torch is built without CUDA", "pip install --upgrade torch"
            )
        )
    for weight, rows, what in CASES:
        choice = choose_kernel(weight, torch.bfloat16, rows, device)
        status = "note" if "missing" in choice.reason else "ok"
        fix = "apt-get install gcc" if status == "note" and device == "cpu" else ""
        checks.append(Check("kernel", status, f"{weight} {what}: {choice.name} ({choice.reason})", fix))
    return [*checks, *(_gpu_block_checks() if on_gpu else [*_cpu_block_checks(), _huge_pages()]), _gguf_check()]


def _cpu_block_checks() -> list[Check]:
    """Who does what lies between the matrix products, and who rounds weights while they are loaded."""
    import torch

    from qwenfit.kernels import block, native, rounding

    with torch.inference_mode():
        runs = {dtype: block.usable(torch.empty(1, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32)}
        half = block.usable(torch.empty(1, dtype=torch.float16))
    what = "norm, rotation, gate, cache and decode attention"
    rounds = rounding.usable(8, torch.bfloat16, torch.device("cpu"), 4096, 128)
    if all(runs.values()) and rounds and not half:
        return [
            Check("kernel", "ok", f"{what}: native block (bf16 and fp32 activations: one C call each)"),
            Check("kernel", "ok", f"{what} in fp16: PyTorch (the C kernels read bf16 and fp32 only)"),
            Check("kernel", "ok", "rounding to int8 and int4 at load: native (straight into the packed layout)"),
        ]
    why = native.why_not() or "they did not compile"
    return [
        Check("kernel", "note", f"{what}: PyTorch (the C kernels are missing: {why})", "apt-get install gcc"),
        Check("kernel", "note", f"rounding to int8 and int4 at load: PyTorch, slow ({why})", "apt-get install gcc"),
    ]


def _huge_pages() -> Check:
    from qwenfit.kernels import pages

    found = pages.setting()
    if found in ("madvise", "always"):
        return Check("memory", "ok", f"huge pages: {found}, so weights load in pages of 2 MiB")
    fix = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled" if found else ""
    return Check(
        "memory", "note", f"huge pages: {found or 'none here'}, so weights load in pages of 4 KiB, slower", fix
    )


def _gguf_check() -> Check:
    from qwenfit.kernels import gguf_blocks, native

    what = "dequantising GGUF at load"
    if gguf_blocks.usable():
        return Check(
            "kernel", "ok", f"{what}: native for {', '.join(sorted(gguf_blocks.TYPES))}; else the gguf package"
        )
    why = native.why_not() or "they did not compile"
    return Check("kernel", "note", f"{what}: the gguf package, slow ({why})", "apt-get install gcc")


def _gpu_block_checks() -> list[Check]:
    what = "norm, rotation, gate, cache and attention"
    if importlib.util.find_spec("triton") is None:
        return [Check("kernel", "missing", f"{what}: PyTorch (triton is not installed)", "pip install triton")]
    return [
        Check("kernel", "ok", f"{what}, decode: triton, one CUDA graph a step (nothing waits for the host)"),
        Check("kernel", "ok", f"{what}, prompt: triton (ragged attention over the paged cache)"),
        _many_rows_check(),
    ]


def _many_rows_check() -> Check:
    import torch

    from qwenfit.kernels.choice import HOPPER_ROWS, TILES_ROWS

    try:
        from qwenfit.kernels.hopper.product import why_not

        missing = why_not(torch.device("cuda", 0))
    except ImportError as failure:  # of a triton that is broken
        missing = str(failure)
    what = f"bf16 {TILES_ROWS[1] + 1} to {HOPPER_ROWS} rows"
    if not missing:
        return Check("kernel", "ok", f"{what}: CUDA C++ (the MLP and the head; weights come before they are needed)")
    return Check("kernel", "note", f"{what}: torch (the faster kernel is not taken: {missing})")


def report(checks: list[Check]) -> str:
    """One line a finding."""
    rows = []
    for check in checks:
        fix = f"  -> {check.fix}" if check.fix else ""
        rows.append(f"{check.status:<8}{check.topic:<10}{check.text}{fix}")
    return "\n".join(rows)
