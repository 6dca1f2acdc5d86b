"""How many blocks the KV cache gets."""

from __future__ import annotations

import torch

from qwenfit.config import ModelConfig
from qwenfit.errors import DoesNotFit
from qwenfit.model.kv_cache import kv_bytes_per_token


def num_blocks_for(config: ModelConfig, kv_cache: str, block_size: int, budget: int, max_tokens: int) -> int:
    """Blocks that `budget` bytes hold, but no more than `max_tokens` need. Raises DoesNotFit when there is none."""
    block_bytes = kv_bytes_per_token(config, kv_cache) * block_size
    blocks = min(budget // block_bytes, -(-max_tokens // block_size))
    if blocks < 1:
        raise DoesNotFit(
            f"One block of the KV cache takes {block_bytes} bytes; {max(budget, 0)} are left for it.",
            "Choose a smaller model, --precision int4, or --kv-cache int8.",
        )
    return blocks


def free_bytes(device: str) -> int:
    """What a KV cache may take of the memory that is free now: 0.85 of a GPU's, half of a computer's."""
    if torch.device(device).type == "cuda":
        return int(0.85 * torch.cuda.mem_get_info(device)[0])
    import psutil  # type: ignore[import-untyped, unused-ignore]

    return int(psutil.virtual_memory().available // 2)


def free_host_bytes(device: str) -> int:
    """What requests that wait may take of the host's memory: a quarter of what is free, and none beside a CPU's own."""
    if torch.device(device).type != "cuda":
        return 0
    from qwenfit.detect.cpu import cpu_host

    return cpu_host().usable_bytes // 4
