"""QuantizedWeight: one linear layer's weight in 4 or 8 bits, before any kernel's own layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class QuantizedWeight:
    """w[o, i] = scales[o, i // group_size] * (q[o, i] - zeros[o, i // group_size]).

    What GPTQ checkpoints, round-to-nearest and GGUF re-quantisation all produce, and what the kernels pack from.
    With `perm` (GPTQ's act-order) the columns are stored permuted: the product is x[..., perm] @ w.T.
    """

    bits: int  # 4 or 8
    group_size: int  # columns that share a scale; the last group may be shorter
    q: torch.Tensor  # uint8 [out, in], values 0 .. 2**bits - 1
    scales: torch.Tensor  # float [out, groups]
    zeros: torch.Tensor  # same dtype [out, groups]; the true zero (8 for symmetric 4 bits, 128 for 8)
    perm: torch.Tensor | None = None  # int64 [in]

    def __post_init__(self) -> None:
        out_features, in_features = self.q.shape
        if self.bits not in (4, 8) or self.q.dtype != torch.uint8:
            raise ValueError(f"bits must be 4 or 8 and q uint8, not {self.bits} and {self.q.dtype}")
        groups = -(-in_features // self.group_size)
        if self.scales.shape != (out_features, groups) or self.zeros.shape != (out_features, groups):
            shapes = f"{tuple(self.scales.shape)} and {tuple(self.zeros.shape)}"
            raise ValueError(f"scales and zeros must be {(out_features, groups)}, not {shapes}")

    @property
    def out_features(self) -> int:
        return self.q.shape[0]

    @property
    def in_features(self) -> int:
        return self.q.shape[1]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight [out, in] with its columns in the order of the input (`perm` undone), computed in float32."""
        scales = self.scales.float().repeat_interleave(self.group_size, dim=1)[:, : self.in_features]
        zeros = self.zeros.float().repeat_interleave(self.group_size, dim=1)[:, : self.in_features]
        weight = (self.q.float() - zeros) * scales
        if self.perm is not None:
            unpermuted = torch.empty_like(weight)
            unpermuted[:, self.perm] = weight
            weight = unpermuted
        return weight.to(dtype)
