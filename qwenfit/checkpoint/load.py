"""Load a model: resolve it, check its headers, then stream tensor by tensor into the network's final parameters."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import nn

from qwenfit.checkpoint.expected import Parameter
from qwenfit.checkpoint.names import is_layer_linear
from qwenfit.checkpoint.random_weights import RandomWeights
from qwenfit.checkpoint.reading import Job, run, scratch
from qwenfit.checkpoint.resolve import hub_id, resolve_model
from qwenfit.checkpoint.weights import FLOAT_DTYPES, CanonicalWeights, WeightSource
from qwenfit.checkpoint.weights_gguf import GGUFSource
from qwenfit.checkpoint.weights_safetensors import SafetensorsSource
from qwenfit.config import ModelConfig
from qwenfit.detect import cpu_host
from qwenfit.errors import DoesNotFit, NotFound, UsageError
from qwenfit.kernels import native, pages, rounding
from qwenfit.kernels.packed import PackedWeight
from qwenfit.model.linear import Linear
from qwenfit.model.transformer import Transformer
from qwenfit.planning.render import size
from qwenfit.quantize.rtn import quantize_rtn
from qwenfit.quantize.types import QuantizedWeight

FLOAT_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INT_PRECISIONS = {"int8": 8, "int4": 4}
GROUP_SIZE = 128  # of weights that are quantized while loading
ROUNDED_AT_ONCE = 1 << 20  # weights that a thread has in 16 or 32 bits for it

Progress = Callable[[int, int], None]  # (bytes of the checkpoint done, bytes in all)


def load_model(
    path_or_name: str | Path | ModelConfig,
    *,
    precision: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    head_precision: str | None = None,
    random_weights: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> tuple[Transformer, ModelConfig]:
    """The network of a checkpoint folder, a .gguf, a downloaded Hub id or (random weights) a catalog name.

    precision: of the layer linears. "bf16", "fp16", "fp32": plain, also from GPTQ, AWQ and GGUF. "int8", "int4": a
    GPTQ or AWQ checkpoint of those bits as it is; anything else rounded to nearest in groups of 128. None: as stored.
    dtype: of activations, embedding, norms and biases; by default that of a float precision, else the checkpoint's.
    head_precision: None keeps the head in `dtype`; "int8" or "int4" quantizes it, leaving a tied embedding plain.
    Peak memory is the model plus one tensor. Parameters do not require gradients.
    Raises NotFound, UsageError, and BadFile for files that are malformed or contradict their config.
    """
    config = resolve_model(path_or_name)
    if not random_weights:
        config = with_files(config, str(path_or_name))
    bits, dtype = _choose(config, precision, dtype)
    head_bits = _bits(head_precision, "head precision") if head_precision else None
    weights: CanonicalWeights | RandomWeights
    if random_weights:
        weights = RandomWeights(config, seed)
    else:
        weights = open_weights(config)
        weights.check_surplus()
    loader = Loader(Transformer(config, dtype, "meta"), weights, bits, head_bits, torch.device(device), progress)
    return loader.load().eval(), config


def open_weights(config: ModelConfig) -> CanonicalWeights:
    """The checked weights of a config that came from files, by the headers in it. Raises BadFile or NotFound."""
    tensors = config.tensors or ()
    if not tensors or not all(tensor.file for tensor in tensors):
        raise NotFound(
            f"{config.source} has a config but no weights.",
            "Download the weights too, or measure without them: qwenfit bench decode MODEL.",
        )
    gguf = Path(config.source).suffix.lower() == ".gguf"
    try:
        source: WeightSource = (GGUFSource if gguf else SafetensorsSource)(config.source, tensors)
    except OSError as error:
        raise NotFound(f"{error.filename} cannot be read any more ({error.strerror}).") from None
    return CanonicalWeights(source, config)


def state_dict(config: ModelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every canonical parameter of a checkpoint, dequantised to `dtype` on the CPU, by canonical name."""
    weights = open_weights(config)
    weights.check_surplus()
    return {p.name: weights.read(p, dtype) for p in weights.in_file_order()}


def with_files(config: ModelConfig, spec: str) -> ModelConfig:
    """A config whose source is on disk: a catalog name is that of a Hub model, which may have been downloaded."""
    if os.path.exists(config.source):
        return config
    if (repo_id := hub_id(spec)) is not None and re.fullmatch(r"[^/]+/[^/]+", repo_id):
        from qwenfit.checkpoint.hub import cached_snapshot

        if (snapshot := cached_snapshot(repo_id)) is not None:
            return resolve_model(snapshot)
    raise NotFound(
        f"The weights of {spec} are not on this machine.",
        f"Download them: qwenfit pull {spec}. To measure without them: qwenfit bench decode {spec}.",
    )


def _choose(config: ModelConfig, precision: str | None, dtype: torch.dtype | None) -> tuple[int | None, torch.dtype]:
    """(bits of the layer linears or None, compute dtype)."""
    stored = config.quantization
    if precision in FLOAT_PRECISIONS:
        if dtype not in (None, FLOAT_PRECISIONS[precision]):
            raise UsageError(f"Precision {precision} and a compute type of {dtype} contradict each other.")
        return None, FLOAT_PRECISIONS[precision]
    if precision is None:
        bits = stored.bits if stored else None
    else:
        bits = _bits(precision, "precision")
    if stored and stored.bits != bits:
        raise UsageError(
            f"{config.name} holds int{stored.bits} weights, which int{bits} would round a second time.",
            f"--precision int{stored.bits}, or bf16 to dequantise them.",
        )
    return bits, dtype or FLOAT_DTYPES[config.dtype]


def _bits(precision: str, what: str) -> int:
    if precision not in INT_PRECISIONS:
        known = [*FLOAT_PRECISIONS, *INT_PRECISIONS] if what == "precision" else [*INT_PRECISIONS]
        raise UsageError(f"There is no {what} {precision!r}.", f"One of {', '.join(known)}.")
    return INT_PRECISIONS[precision]


class Loader:
    """Fills a network that is on no device yet.

    What is only read, and what round.c rounds, becomes jobs for several threads; every other layer is made at once,
    one after the other.
    """

    def __init__(
        self,
        model: Transformer,
        weights: CanonicalWeights | RandomWeights,
        bits: int | None,
        head_bits: int | None,
        device: torch.device,
        progress: Progress | None,
    ) -> None:
        self.model, self.weights, self.device = model, weights, device
        self.bits, self.head_bits = bits, head_bits
        self.progress = progress
        self.parameters = weights.in_file_order()
        self.total = sum(weights.stored_size(parameter) for parameter in self.parameters)
        self.done = 0

    def load(self) -> Transformer:
        """Raises DoesNotFit, before anything is allocated, when the weights alone are more than what is free."""
        self._check_room()
        jobs: list[Job] = []
        for parameter in self.parameters:
            todo = self._fill(parameter)
            if not any(job.nbytes for job in todo):  # it was made at once
                self._count(self.weights.stored_size(parameter))
            jobs += todo
        run(jobs, self._count)
        return self.model

    def _check_room(self) -> None:
        needed, free = sum(map(self._loaded_bytes, self.parameters)), free_memory(self.device)
        if free is not None and needed > free:
            raise DoesNotFit(
                f"The weights of {self.model.config.name} take {size(needed)} on {self.device} "
                f"and {size(max(free, 0))} are free.",
                f"qwenfit plan {self.model.config.source} shows what would fit, such as --precision int4",
            )

    def _loaded_bytes(self, parameter: Parameter) -> int:
        """Bytes that a parameter takes in the network; a tied head that is quantized adds its own."""
        plain = math.prod(parameter.shape) * self.model.dtype.itemsize
        tied = self.model.config.tie_word_embeddings
        if parameter.name == "embed_tokens.weight":
            return plain + (_integer_bytes(parameter, self.head_bits) if tied and self.head_bits else 0)
        bits = self.head_bits if parameter.name == "lm_head.weight" else self.bits
        return _integer_bytes(parameter, bits) if bits and len(parameter.shape) == 2 else plain

    def _count(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)

    def _fill(self, parameter: Parameter) -> list[Job]:
        """Put one parameter into its place; a tied head that is quantized is made along with the embedding."""
        model, name = self.model, parameter.name
        jobs: list[Job] = []
        if self.head_bits and name == ("embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"):
            model.lm_head, jobs = self._quantized(parameter, self.head_bits)
            if name == "lm_head.weight":
                return jobs
            jobs = [Job(job.work, 0) for job in jobs]  # the same bytes count once
        if is_layer_linear(name) and self.bits:
            plain = model.get_submodule(parameter.module)
            assert isinstance(plain, Linear)
            linear, jobs = self._quantized(parameter, self.bits)
            linear.bias = plain.bias  # its own turn comes before or after
            model.set_submodule(parameter.module, linear)
            return jobs
        tensor = pages.empty(parameter.shape, model.dtype, self.device)
        setattr(model.get_submodule(parameter.module), parameter.suffix, nn.Parameter(tensor, requires_grad=False))
        if isinstance(self.weights, CanonicalWeights) and not parameter.quantized:
            return [*jobs, *self.weights.jobs(parameter, 0, tensor)]
        if isinstance(self.weights, RandomWeights):
            self.weights.read_rows(parameter, 0, tensor)
        else:
            tensor.copy_(self.weights.quantized(parameter).dequantize(model.dtype))
        return jobs

    def _quantized(self, parameter: Parameter, bits: int) -> tuple[Linear, list[Job]]:
        """The integer layer of a parameter, and what remains to be done until it holds its numbers."""
        weights, dtype = self.weights, self.model.dtype
        if isinstance(weights, CanonicalWeights) and not parameter.quantized:
            out_features, in_features = parameter.shape
            if rounding.usable(bits, dtype, self.device, in_features, GROUP_SIZE):
                packed = rounding.empty(bits, out_features, in_features, GROUP_SIZE)
                return Linear(None, None, packed), list(_rounding_jobs(weights, parameter, packed))
            linear = Linear.from_quantized(_quantize(weights, parameter, bits, self.device), None, dtype, self.device)
        elif isinstance(weights, CanonicalWeights):
            linear = Linear.from_quantized(weights.quantized(parameter), None, dtype, self.device)
        else:
            linear = Linear(None, None, weights.packed(parameter, bits, GROUP_SIZE, dtype, self.device))
        return linear, []


def _integer_bytes(parameter: Parameter, bits: int) -> int:
    """Codes, and a float32 scale for each group."""
    elements = math.prod(parameter.shape)
    return elements * bits // 8 + elements // GROUP_SIZE * 4


def free_memory(device: torch.device) -> int | None:
    """Bytes that weights can take there now: what is free of a GPU, of RAM and swap; None for other devices."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    if device.type != "cpu":
        return None
    import psutil  # type: ignore[import-untyped, unused-ignore]

    return cpu_host().usable_bytes + int(psutil.swap_memory().free)


def _rounding_jobs(weights: CanonicalWeights, parameter: Parameter, packed: PackedWeight) -> Iterator[Job]:
    """Read rows as they are stored and round them where they go, a few blocks of the packed layout at a time.

    What lies in GGUF blocks becomes floats a few rows at a time, in the caches: no row of it is ever whole in memory.
    """
    out_features, in_features = parameter.shape
    stored = weights.stored_dtype(parameter)
    dtype = stored if stored in native.DTYPES else torch.float32
    size = weights.stored_size(parameter)
    step = max(native.ROWS, ROUNDED_AT_ONCE // in_features // native.ROWS * native.ROWS)
    in_blocks = weights.in_blocks(parameter, native.ROWS)

    def work(start: int, stop: int) -> None:
        if in_blocks:
            for first, count, kind, blocks in weights.blocks(parameter, start, stop):
                rounding.round_blocks(kind, blocks, count, packed, first)
            return
        rows = scratch("rows", (stop - start) * in_features * dtype.itemsize).view(dtype).view(-1, in_features)
        for job in weights.jobs(parameter, start, rows):
            job.work()
        rounding.round_rows(rows, packed, start)

    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        yield Job(partial(work, start, stop), size * stop // out_features - size * start // out_features)


def _quantize(weights: CanonicalWeights, parameter: Parameter, bits: int, device: torch.device) -> QuantizedWeight:
    """Round a plain weight to nearest, a block of rows at a time, so that it is never whole in 16 or 32 bits."""
    out_features, in_features = parameter.shape
    step = min(out_features, max(1, ROUNDED_AT_ONCE // in_features))
    block = torch.empty(step, in_features, device=device)
    groups = -(-in_features // GROUP_SIZE)
    q = torch.empty(out_features, in_features, dtype=torch.uint8, device=device)
    scales = torch.empty(out_features, groups, device=device)
    zeros = torch.empty_like(scales)
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        part = block[: rows.stop - start]
        weights.read_rows(parameter, start, part)
        rounded = quantize_rtn(part, bits, GROUP_SIZE)
        q[rows], scales[rows], zeros[rows] = rounded.q, rounded.scales, rounded.zeros
    return QuantizedWeight(bits, min(GROUP_SIZE, in_features), q, scales, zeros)
