"""The guide's software prerequisites beside what is here, and what today's software needs in their place.

The left column is "Requirements" and "Quantization" of the official README (QwenLM/Qwen README.md@03cd81f).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass


@dataclass(frozen=True)
class Prerequisite:
    """One line of the guide: what it asks for, what is installed here, and what qwenfit needs."""

    what: str
    guide: str
    here: str
    today: str

    @property
    def text(self) -> str:
        return f"{self.what}: the guide {self.guide}; here {self.here}; {self.today}"


# what, the package here (None: not one), what the guide asks, what qwenfit needs
_ROWS = (
    ("transformers", "transformers", "asks for 4.32 or newer", "not needed: no remote code, own network"),
    ("flash-attention", "flash-attn", "recommends it", "not needed: attention is torch's or a kernel of ours"),
    ("auto-gptq, optimum", "auto-gptq", "asks for them to run Int4 and Int8", "not needed: own kernels read GPTQ"),
    ("peft", "peft", "asks for it to finetune", "not needed: adapters are written in its format"),
    ("deepspeed", "deepspeed", "asks for it to finetune", "optional: torch's own FSDP does ZeRO-2 and ZeRO-3"),
    ("tiktoken", "tiktoken", "asks for it", "needed for Qwen-1's vocabulary"),
)


def prerequisites() -> list[Prerequisite]:
    """Python, torch and CUDA, then the packages."""
    return [
        Prerequisite("python", "asks for 3.8 or newer", platform.python_version(), "qwenfit needs 3.11"),
        Prerequisite("torch", "asks for 1.12, recommends 2.0", _version("torch"), "qwenfit needs 2.11"),
        Prerequisite("CUDA", "recommends 11.4 or newer", _cuda(), "comes with torch; a CPU runs too"),
        *(Prerequisite(what, guide, _version(package), today) for what, package, guide, today in _ROWS),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda() -> str:
    if importlib.util.find_spec("torch") is None:
        return "no torch"
    import torch

    return torch.version.cuda or "none in this torch"
