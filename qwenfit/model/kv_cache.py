"""The paged KV cache: one allocation, made once, cut into blocks that the engine hands to sequences."""

from __future__ import annotations

import torch

from qwenfit.config import ModelConfig
from qwenfit.errors import UsageError
from qwenfit.kernels.attention import LayerCache

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.uint8}
PARITY = "qwen1-int8"  # Qwen-1's own uint8 cache, to compare with the original code: a prompt must come as one chunk
AFFINE_BYTES = 8  # a float32 scale and zero for each token, head and side of an int8 cache


def kv_bytes_per_token(config: ModelConfig, dtype: str) -> int:
    """Bytes that one token takes in the cache, over all layers, keys and values.

    2 * layers * kv_heads * head_dim * itemsize; int8 adds a float32 scale and zero, 8 bytes, for each key and value.
    """
    vectors = 2 * config.num_layers * config.num_kv_heads
    if dtype in ("int8", PARITY):
        return vectors * (config.head_dim + AFFINE_BYTES)
    return vectors * config.head_dim * DTYPES[dtype].itemsize


class KVCache:
    """`num_blocks` blocks of `block_size` tokens for every layer; `layers[i]` is layer i's LayerCache.

    `nbytes` is exactly num_blocks * block_size * kv_bytes_per_token(config, dtype).
    Raises UsageError for an unknown dtype.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: str = "bf16",
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in DTYPES and dtype != PARITY:
            raise UsageError(f"There is no {dtype} KV cache.", f"choose one of {', '.join(DTYPES)}")
        self.num_blocks, self.block_size, self.dtype = num_blocks, block_size, dtype
        shape = (2, config.num_layers, num_blocks, block_size, config.num_kv_heads)
        stored = torch.uint8 if dtype == PARITY else DTYPES[dtype]
        self._data = torch.zeros(*shape, config.head_dim, dtype=stored, device=device)
        self._affine = torch.zeros(*shape, 2, device=device) if stored == torch.uint8 else None
        self.layers = [self._layer(i) for i in range(config.num_layers)]

    def _layer(self, index: int) -> LayerCache:
        key, value = self._data[:, index]
        if self._affine is None:
            return LayerCache(key, value)
        key_affine, value_affine = self._affine[:, index]
        return LayerCache(key, value, key_affine, value_affine, per_chunk=self.dtype == PARITY)

    @property
    def memory(self) -> torch.Tensor:
        """All keys and values as bytes, for who needs memory before there is anything in them."""
        return self._data.view(torch.uint8).flatten()

    @property
    def by_block(self) -> list[torch.Tensor]:
        """All that the cache holds, as views [num_blocks, 2 * layers, ...] of what a block has in each layer."""
        views = []
        for part in (self._data, self._affine):
            if part is not None:
                whole = part.flatten(0, 1).flatten(2).view(torch.uint8)
                if whole.shape[-1] % 8 == 0:  # they are only copied, and in wide numbers soonest
                    whole = whole.view(torch.int64)
                views.append(whole.transpose(0, 1))
        return views

    @property
    def nbytes(self) -> int:
        return self._data.nbytes + (0 if self._affine is None else self._affine.nbytes)
