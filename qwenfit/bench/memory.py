"""Memory as it is: of this process, and by what the engine holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qwenfit.engine.llm import LLM


@dataclass(frozen=True)
class MeasuredMemory:
    """Bytes, the fields of planning.types.Memory as far as they can be measured. On a CPU allocated is the process."""

    weights: int
    kv_cache: int
    allocated: int
    reserved: int
    process: int

    @property
    def unaccounted(self) -> int:
        """What the process holds beyond weights and cache."""
        return self.process - self.weights - self.kv_cache


def process_bytes(device: str) -> int:
    """Resident bytes of this process on a CPU; what the driver counts for it on a GPU."""
    if device.startswith("cuda"):
        return _gpu_process_bytes(device)
    import psutil  # type: ignore[import-untyped, unused-ignore]

    return int(psutil.Process().memory_info().rss)


def _gpu_process_bytes(device: str) -> int:
    """Used on the device in all: containers hide which process holds it, so nothing else may run beside."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return int(total - free)


def weight_bytes_of(llm: LLM) -> int:
    """Bytes of the network's parameters and packed weights, storages counted once."""
    import torch

    seen: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()

    model = llm.engine.runner.model
    assert isinstance(model, torch.nn.Module)
    for tensor in (*model.parameters(), *model.buffers()):
        count(tensor)
    for module in model.modules():
        packed = getattr(module, "packed", None)
        for value in vars(packed).values() if packed is not None else ():
            if isinstance(value, torch.Tensor):
                count(value)
    return sum(seen.values())


def linear_bytes(llm: LLM) -> tuple[int, int]:
    """Bytes that a decode step reads of plain matrices (the head's too) and of packed ones."""
    import torch

    from qwenfit.model.linear import Linear

    model: Any = llm.engine.runner.model
    plain = packed = 0
    for module in model.modules():
        if isinstance(module, Linear):
            plain += sum(parameter.nbytes for parameter in module.parameters())
            parts = [] if module.packed is None else vars(module.packed).values()
            packed += sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))
    if getattr(model, "lm_head", None) is None:
        plain += model.embed_tokens.weight.nbytes
    return plain, packed


def measure_memory(llm: LLM) -> MeasuredMemory:
    """The parts that can be told apart, now; peaks where the device keeps them."""
    import torch

    process = process_bytes(llm.device)
    allocated = reserved = process
    if llm.device.startswith("cuda"):
        allocated, reserved = torch.cuda.max_memory_allocated(llm.device), torch.cuda.max_memory_reserved(llm.device)
    return MeasuredMemory(weight_bytes_of(llm), llm.engine.runner.cache.nbytes, allocated, reserved, process)
