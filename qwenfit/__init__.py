"""qwenfit: plan, run, tune and measure Qwen models on your own hardware.

`plan()` needs the standard library only; `LLM` and `SamplingParams` import torch when they are first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenfit.engine.llm import LLM as LLM
    from qwenfit.engine.params import SamplingParams as SamplingParams
    from qwenfit.planning.planner import plan as plan

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "plan"]
_HOMES = {
    "plan": "qwenfit.planning.planner",
    "LLM": "qwenfit.engine.llm",
    "SamplingParams": "qwenfit.engine.params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qwenfit' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
