"""The Plan and its parts: memory by part, speed with an interval, a verdict, and the command that does it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from qwenfit.config import ModelConfig
from qwenfit.hardware import Hardware
from qwenfit.planning.task import Task

FITS, TIGHT, DOES_NOT_FIT = "fits", "tight", "does not fit"
BANDWIDTH, COMPUTE, HOST, LINK = "memory bandwidth", "compute", "host", "link"


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the moment of the peak. The parts sum to `allocated`."""

    weights: int = 0
    kv_cache: int = 0
    logits: int = 0
    activations: int = 0
    gradients: int = 0
    optimizer: int = 0
    adapters: int = 0
    workspace: int = 0
    reserve: int = 0  # blocks the allocator holds beyond what is allocated
    context: int = 0  # CUDA context and libraries, outside the allocator

    PARTS = ("weights", "kv_cache", "adapters", "gradients", "optimizer", "logits", "activations", "workspace")

    @property
    def allocated(self) -> int:
        """Peak of the framework's allocator."""
        return sum(int(getattr(self, part)) for part in self.PARTS)

    @property
    def reserved(self) -> int:
        """What the allocator took from the device."""
        return self.allocated + self.reserve

    @property
    def process(self) -> int:
        """What the device's own counter shows for the process: what must fit on the card."""
        return self.reserved + self.context

    def to_dict(self) -> dict[str, int]:
        parts = {f.name: int(getattr(self, f.name)) for f in fields(self)}
        return parts | {"allocated": self.allocated, "reserved": self.reserved, "process": self.process}


@dataclass(frozen=True)
class Interval:
    """A range that the measured value is expected in."""

    low: float
    high: float


@dataclass(frozen=True)
class Speed:
    """Predicted speed. Fields that a task does not have are None."""

    bound: str  # BANDWIDTH | COMPUTE | HOST | LINK: the slowest, which sets the pace
    tokens_per_s: float  # inference: generated tokens of all requests together; finetuning: trained tokens, all GPUs
    interval: Interval  # of tokens_per_s
    tokens_per_s_per_request: float | None = None
    tokens_per_s_per_request_interval: Interval | None = None
    time_to_first_token: float | None = None  # s, one prompt alone
    time_to_first_token_interval: Interval | None = None
    time_to_first_token_bound: str | None = None
    prompt_tokens_per_s: float | None = None
    seconds_per_iter: float | None = None  # one optimizer step
    seconds_per_iter_interval: Interval | None = None
    terms: dict[str, float] = field(default_factory=dict)  # seconds by cause, per decode step or per iteration


@dataclass(frozen=True)
class Advice:
    """One recommendation: what to do, why, and what it gives (bytes on the fullest device, tokens/s, or None)."""

    what: str
    why: str
    changes: dict[str, Any] = field(default_factory=dict)  # plan() arguments that differ
    process_bytes: int | None = None
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class Plan:
    """What a model on some hardware doing a task takes and gives. `memory` is the fullest device's."""

    model: ModelConfig
    hardware: Hardware
    task: Task
    precision: str
    stack: str
    parallel: str  # "single" | "layers" | "tensor" | "data" | "zero2" | "zero3"
    memory: Memory
    memory_per_device: tuple[Memory, ...]
    speed: Speed
    verdict: str
    capacity: int  # usable bytes of one device
    command: str
    spec: str = ""  # the model as the user named it: a catalog name, path or Hub id
    asked_parallel: str | None = None  # what the user asked for; `parallel` is what is done
    host_factor: float = 1.0  # launch time of this host relative to the guide's
    notes: tuple[str, ...] = ()
    advice: tuple[Advice, ...] = ()

    @property
    def headroom(self) -> int:
        """Bytes left on the fullest device; negative when it does not fit."""
        return self.capacity - self.memory.process

    @property
    def fits(self) -> bool:
        return self.verdict != DOES_NOT_FIT

    def to_dict(self) -> dict[str, Any]:
        """What `--json` prints: plain numbers and strings, bytes and seconds, with a schema version."""
        device = self.hardware.device
        return {
            "schema": 1,
            "model": self.model.name,
            "parameters": self.model.parameters,
            "hardware": {
                "device": device.name,
                "gpus": self.hardware.gpus,
                "nodes": self.hardware.nodes,
                "memory_bytes": device.memory_bytes,
                "usable_bytes": self.capacity,
                "network_bandwidth": self.hardware.network_bandwidth,
                "host_factor": self.host_factor,
                "source": device.source,
            },
            "task": {"name": self.task.name} | asdict(self.task),
            "precision": self.precision,
            "stack": self.stack,
            "parallel": self.parallel,
            "memory": self.memory.to_dict(),
            "memory_per_device": [m.to_dict() for m in self.memory_per_device],
            "headroom": self.headroom,
            "speed": asdict(self.speed),
            "verdict": self.verdict,
            "command": self.command,
            "notes": list(self.notes),
            "advice": [asdict(a) for a in self.advice],
        }
