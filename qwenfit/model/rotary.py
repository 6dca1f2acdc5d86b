"""What a token's position does to its query and key: the rotation's angles, and Qwen-1's LogN scale.

Plain RoPE, Qwen-1's dynamic NTK (a larger base, from the prompt's length) and YaRN (each frequency rescaled by its
own wavelength) differ only in the inverse frequencies, so they are one table here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qwenfit.config import ModelConfig, YarnScaling
from qwenfit.kernels.rotary import both_halves


@dataclass(frozen=True)
class Angles:
    """A step's cosines and sines, for `kernels.rotary.rotate`, and the factor on its queries."""

    cos: torch.Tensor  # float32 [T, 1, head_dim]
    sin: torch.Tensor  # float32 [T, 1, head_dim], the first half negated
    query_scale: torch.Tensor | None = None  # [T, 1, 1] in the model's dtype; None: 1 everywhere


class Rotary:
    """The angles of a model. Inverse frequencies are kept for each alpha that has been asked for."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.scaling = attention_scaling(config.yarn) if config.yarn else 1.0
        self._inverse: dict[tuple[float, torch.device], torch.Tensor] = {}

    def angles(
        self, positions: torch.Tensor, lens: list[int], alphas: list[float], max_length: float, dtype: torch.dtype
    ) -> Angles:
        """For tokens at `positions` int64 [T], of sequences with `lens` tokens and an NTK alpha each.

        `max_length`: no position reaches it. `dtype`: the model's.
        """
        if len(set(alphas)) == 1:
            inverse = self._inverse_frequencies(alphas[0], positions.device)
        else:
            each = torch.stack([self._inverse_frequencies(alpha, positions.device) for alpha in alphas])
            inverse = each.repeat_interleave(torch.tensor(lens, device=positions.device), dim=0)
        radians = positions[:, None] * inverse  # [T, head_dim / 2]
        cos, sin = radians.cos().mul_(self.scaling), radians.sin().mul_(self.scaling)
        scale = None
        if self.config.use_logn_attn and max_length > self.config.training_length:
            scale = logn_scale(positions, self.config.training_length).to(dtype)[:, None, None]
        return Angles(*both_halves(cos, sin), scale)

    def _inverse_frequencies(self, alpha: float, device: torch.device) -> torch.Tensor:
        key = (alpha, device)
        if key not in self._inverse:
            config = self.config
            self._inverse[key] = inverse_frequencies(config.head_dim, config.rope_theta, alpha, config.yarn).to(device)
        return self._inverse[key]


def inverse_frequencies(
    head_dim: int, theta: float, alpha: float = 1.0, yarn: YarnScaling | None = None
) -> torch.Tensor:
    """float32 [head_dim / 2]: 1 / base^(2i / head_dim), base = theta * alpha^(head_dim / (head_dim - 2)).

    The base is that of dynamic NTK (modeling_qwen.py, Nov-2023 release). With `yarn`, dimensions that turn more than
    `beta_fast` times within the original context keep their frequency, those that turn less than `beta_slow` times
    are slowed by `factor`, and those between are blended linearly (arXiv 2309.00071, section 3.2).
    """
    base = theta * alpha ** (head_dim / (head_dim - 2))
    exponents = torch.arange(0, head_dim, 2).float() / head_dim
    plain = 1.0 / torch.pow(base, exponents)
    if yarn is None:
        return plain

    def dimension(turns: float) -> float:
        """The dimension that turns `turns` times within the original context."""
        context = yarn.original_max_position_embeddings
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), head_dim - 1)
    ramp = ((torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain / yarn.factor * ramp + plain * (1 - ramp)


def attention_scaling(yarn: YarnScaling) -> float:
    """YaRN's factor on cos and sin: 0.1 ln(factor) + 1 unless the config gives one (arXiv 2309.00071, eq. 22)."""
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    return 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0


def logn_scale(positions: torch.Tensor, training_length: int) -> torch.Tensor:
    """Qwen-1's LogN factor on queries, float32 [T]: log(i) / log(S) past S = training_length, i = position + 1."""
    count = (positions + 1).clamp(min=training_length).double()
    return torch.log(count).div_(math.log(training_length)).float()
