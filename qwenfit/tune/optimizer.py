"""AdamW (arXiv 1711.05101) with its states in 32, 16 or 8 bits, a bounded number of parameters at a time.

regime  weights           gradients  moments           bytes per trained parameter that is float32 | 16-bit
"fp32"  float32 master    float32    bfloat16 (or 32)  12 | 14
"bf16"  as the network's  as weights bfloat16          - | 8, rounded stochastically
"8bit"  float32 master    as weights 8 bits, blockwise 10 | 10
Parameters that are float32 themselves (adapters) are their own master.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qwenfit.planning.finetune_qwenfit import GROUP_ELEMENTS

BLOCK = 256  # values that share a scale in an 8-bit moment


@dataclass(frozen=True)
class Slice:
    """Elements `start` to `stop` of a flattened parameter."""

    name: str
    start: int
    stop: int


class PlainMoment:
    """A moment stored as a tensor of one dtype; an unsigned one in bfloat16 is rounded stochastically.

    The second moment changes by less than half a unit in the last place a step, and would stand still otherwise.
    """

    def __init__(self, elements: int, signed: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.signed = signed
        self.values = torch.zeros(elements, dtype=dtype, device=device)

    def load(self) -> Tensor:
        """float32 [elements], the caller's to change."""
        return self.values.float() if self.values.dtype != torch.float32 else self.values.clone()

    def store(self, values: Tensor, generator: torch.Generator) -> None:
        if self.signed or self.values.dtype != torch.bfloat16:
            self.values.copy_(values)
        else:
            self.values = round_stochastically(values, generator)

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}


class Moment8:
    """A moment in 8 bits: code = 127 sqrt(|m| / max) with m's sign, or 255 (v / max)^(1/4), in blocks.

    The roots spend codes on small values, as the dynamic type of arXiv 2110.02861 does. v is rounded stochastically,
    since it changes by less than a code a step, and never to 0: under an m that is not 0 the step had no bound.
    """

    def __init__(self, elements: int, signed: bool, device: torch.device) -> None:
        blocks = -(-elements // BLOCK)
        self.elements, self.signed = elements, signed
        self.codes = torch.zeros(blocks, BLOCK, dtype=torch.int8 if signed else torch.uint8, device=device)
        self.peaks = torch.zeros(blocks, 1, device=device)

    def load(self) -> Tensor:
        codes = self.codes.float()
        if self.signed:
            values = codes.mul_(codes.abs()).div_(127.0**2)
        else:
            values = codes.div_(255.0).square_().square_()
        return values.mul_(self.peaks).flatten()[: self.elements]

    def store(self, values: Tensor, generator: torch.Generator) -> None:
        blocks = torch.nn.functional.pad(values, (0, self.codes.numel() - self.elements)).view_as(self.codes)
        self.peaks = blocks.abs().amax(1, keepdim=True)
        share = blocks / self.peaks.clamp(min=torch.finfo(torch.float32).tiny)
        if self.signed:
            self.codes = share.abs().sqrt_().mul_(127).round_().copysign_(share).to(torch.int8)
        else:
            codes = share.sqrt_().sqrt_().mul_(255)
            noise = torch.rand(codes.shape, device=codes.device, generator=generator)
            self.codes = torch.where(codes > 0, (codes + noise).clamp_(1, 255), codes).to(torch.uint8)

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "peaks": self.peaks}


@dataclass
class _Group:
    """Slices that are updated together, with their states laid end to end."""

    slices: list[Slice]
    decay: bool
    master: Tensor | None  # float32 [elements]; None: the parameters are their own
    moments: tuple[PlainMoment | Moment8, PlainMoment | Moment8]


class AdamW:
    """`accumulate` gradients with backward passes, then `step`, then `zero`. Matrices decay; vectors do not.

    Gradients of 16-bit parameters add up in float32 under "fp32": a hook moves each into its buffer as soon as the
    backward pass has made it. Of sharded parameters each process updates, and keeps the states of, its own part.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        regime: str = "fp32",
        *,
        moments: torch.dtype = torch.bfloat16,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.parameters, self.regime, self.moments = parameters, regime, moments
        self.values = {name: local(p.detach()) for name, p in parameters.items()}
        self.betas, self.eps, self.weight_decay, self.seed = betas, eps, weight_decay, seed
        self.steps = 0
        self.buffers: dict[str, Tensor] = {}
        if regime == "fp32":
            for name, p in parameters.items():
                if p.dtype != torch.float32:
                    self.buffers[name] = torch.zeros_like(self.values[name], dtype=torch.float32)
                    p.register_post_accumulate_grad_hook(_adder(self.buffers[name]))  # type: ignore[no-untyped-call]
        self.groups = [self._group(slices, decay) for slices, decay in _slices(self.values)]

    def _group(self, slices: list[Slice], decay: bool) -> _Group:
        first = self.values[slices[0].name]
        elements = sum(s.stop - s.start for s in slices)
        master = None
        if self.regime != "bf16" and first.dtype != torch.float32:
            master = self._gather(slices, self.values.__getitem__).float()
        if self.regime == "8bit":
            moments = (Moment8(elements, True, first.device), Moment8(elements, False, first.device))
            return _Group(slices, decay, master, moments)
        plain = (
            PlainMoment(elements, True, self.moments, first.device),
            PlainMoment(elements, False, self.moments, first.device),
        )
        return _Group(slices, decay, master, plain)

    def gradient(self, name: str) -> Tensor:
        """The accumulated gradient of a parameter; zeros when nothing reached it."""
        if name in self.buffers:
            return self.buffers[name]
        grad = self.parameters[name].grad
        return torch.zeros_like(self.values[name]) if grad is None else local(grad)

    def gradient_norm(self) -> Tensor:
        """The 2-norm over all gradients: float32 scalar, NaN or infinite if any gradient is."""
        norms = torch._foreach_norm([self.gradient(name) for name in self.values], 2, torch.float32)
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm

    @torch.no_grad()
    def step(self, lr: float, gradient_scale: float = 1.0) -> None:
        """One update with the gradients times `gradient_scale` (clipping)."""
        self.steps += 1
        for index, group in enumerate(self.groups):
            first, second = group.moments
            device = self.values[group.slices[0].name].device
            if fusible(device) and isinstance(first, PlainMoment) and isinstance(second, PlainMoment):
                self._update_fused(index, group, (first.values, second.values), lr, gradient_scale)
            else:
                self._update(index, group, lr, gradient_scale)

    def _update_fused(
        self, index: int, group: _Group, moments: tuple[Tensor, Tensor], lr: float, gradient_scale: float
    ) -> None:
        """As `_update`, in one kernel."""
        from qwenfit.kernels.triton.adamw import Update, adamw

        grad = self._flat(group.slices, self.gradient)
        weight = group.master if group.master is not None else self._flat(group.slices, self.values.__getitem__)
        decay = 1 - lr * self.weight_decay if group.decay else 1.0
        update = Update(lr, self.betas, self.eps, decay, self.steps, gradient_scale)
        adamw(weight, grad, *moments, update, _mixed(self.seed, self.steps, index) % 2**31)
        self._scatter(group.slices, weight)

    def _flat(self, slices: list[Slice], of: Callable[[str], Tensor]) -> Tensor:
        """The slices end to end; a single one as it is, not a copy."""
        if len(slices) == 1:
            (s,) = slices
            return of(s.name).reshape(-1)[s.start : s.stop]
        return self._gather(slices, of)

    def _update(self, index: int, group: _Group, lr: float, gradient_scale: float) -> None:
        beta1, beta2 = self.betas
        grad = self._gather(group.slices, self.gradient).float() * gradient_scale
        weight = group.master
        if weight is None:
            weight = self._gather(group.slices, self.values.__getitem__).float()
        first, second = (moment.load() for moment in group.moments)
        first.lerp_(grad, 1 - beta1)
        second.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        generator = _generator((self.seed, self.steps, index), weight.device)
        for moment, values in zip(group.moments, (first, second), strict=True):
            moment.store(values, generator)
        if group.decay:
            weight.mul_(1 - lr * self.weight_decay)
        denominator = second.div_(1 - beta2**self.steps).sqrt_().add_(self.eps)
        weight.addcdiv_(first, denominator, value=-lr / (1 - beta1**self.steps))
        if self.regime == "bf16" and self.values[group.slices[0].name].dtype == torch.bfloat16:
            weight = round_stochastically(weight, generator)
        self._scatter(group.slices, weight)

    def _gather(self, slices: list[Slice], of: Callable[[str], Tensor]) -> Tensor:
        parts = [of(s.name).reshape(-1)[s.start : s.stop] for s in slices]
        return torch.cat(parts)

    def _scatter(self, slices: list[Slice], values: Tensor) -> None:
        places = [self.values[s.name].view(-1)[s.start : s.stop] for s in slices]
        if len(slices) > 1 or places[0].data_ptr() != values.data_ptr():
            torch._foreach_copy_(places, list(torch.split(values, [len(place) for place in places])))

    def zero(self) -> None:
        """Forget the gradients."""
        for buffer in self.buffers.values():
            buffer.zero_()
        for p in self.parameters.values():
            p.grad = None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """(tensors, JSON) that `restore` needs to go on exactly."""
        tensors = {}
        for i, group in enumerate(self.groups):
            if group.master is not None:
                tensors[f"{i}.master"] = group.master
            for kind, moment in zip(("first", "second"), group.moments, strict=True):
                tensors |= {f"{i}.{kind}.{name}": tensor for name, tensor in moment.tensors().items()}
        layout = [[[s.name, s.start, s.stop] for s in group.slices] for group in self.groups]
        return tensors, {"steps": self.steps, "regime": self.regime, "layout": layout}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor], saved: dict[str, Any]) -> None:
        """Take over a saved state; 16-bit parameters follow their masters. Raises ValueError if it is another's."""
        mine, described = self.state()
        if {**described, "steps": saved.get("steps")} != saved or mine.keys() != tensors.keys():
            raise ValueError("the optimizer's state is of other parameters or another regime")
        for name, tensor in mine.items():
            if (tensor.shape, tensor.dtype) != (tensors[name].shape, tensors[name].dtype):
                raise ValueError(f"the optimizer's {name} has another shape or type")
            tensor.copy_(tensors[name])
        self.steps = int(saved["steps"])
        for group in self.groups:
            if group.master is not None:
                self._scatter(group.slices, group.master)


def _adder(buffer: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        if parameter.grad is not None:
            buffer.add_(local(parameter.grad))
            parameter.grad = None

    return add


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor (torch's DTensor); any other tensor as it is."""
    if hasattr(tensor, "to_local"):
        part: Tensor = tensor.to_local()
        return part
    return tensor


def _slices(parameters: dict[str, Tensor]) -> list[tuple[list[Slice], bool]]:
    """Groups of slices of equal dtype, device and decay, at most GROUP_ELEMENTS together, in a fixed order."""
    groups: list[tuple[list[Slice], bool]] = []
    room: dict[tuple[Any, ...], int] = {}
    open_group: dict[tuple[Any, ...], list[Slice]] = {}
    for name, p in parameters.items():
        key = (p.dtype, p.device, p.dim() > 1)
        start = 0
        while start < p.numel():
            if not room.get(key):
                room[key], open_group[key] = GROUP_ELEMENTS, []
                groups.append((open_group[key], p.dim() > 1))
            stop = min(p.numel(), start + room[key])
            open_group[key].append(Slice(name, start, stop))
            room[key] -= stop - start
            start = stop
    return groups


def fusible(device: torch.device) -> bool:
    """Whether an update is one kernel: on a GPU."""
    return device.type == "cuda"


def _mixed(*parts: int) -> int:
    mixed = 0
    for part in parts:
        mixed = (mixed * 1_000_003 + part + 1) % 2**63
    return mixed


def _generator(parts: tuple[int, ...], device: torch.device) -> torch.Generator:
    """Draws that depend on `parts` alone, so that a resumed run makes the same ones."""
    return torch.Generator(device).manual_seed(_mixed(*parts))


def round_stochastically(values: Tensor, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, up or down with the probability that makes the mean exact (arXiv 2010.06192).

    Updates smaller than half a unit in the last place then add up instead of vanishing.
    """
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    return (values.contiguous().view(torch.int32) + noise).bitwise_and_(-65536).view(torch.float32).to(torch.bfloat16)


def learning_rate_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Of step 0, 1, ...: a line from 0 over `warmup` steps, then half a cosine to 0, or constant.

    As transformers' get_cosine_schedule_with_warmup and get_constant_schedule_with_warmup.
    """
    if step < warmup:
        return step / max(1, warmup)
    if schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
