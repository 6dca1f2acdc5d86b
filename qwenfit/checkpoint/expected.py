"""The tensors that a checkpoint of a given ModelConfig must hold, and the check that it does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qwenfit.checkpoint.bounded import shown
from qwenfit.checkpoint.names import IGNORED, Layout, Piece, canonical_parameters, is_layer_linear, layout_of, pieces_of
from qwenfit.config import ModelConfig, Quantization, TensorInfo
from qwenfit.errors import BadFile

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Parameter:
    """A canonical parameter: its shape, and the stored modules that it is the concatenation of."""

    name: str  # layers.0.self_attn.qkv_proj.weight
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    quantized: bool  # stored as GPTQ or AWQ
    stored: Mapping[str, tuple[int, ...]]  # the stored tensors it takes, with their shapes

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def suffix(self) -> str:  # weight | bias
        return self.name.rpartition(".")[2]


def stored_parameters(config: ModelConfig, gguf: bool) -> dict[str, Parameter]:
    """The canonical parameters of a checkpoint of this config, with the tensors that each is stored as."""
    layout = layout_of(config, gguf)
    return {name: _parameter(name, shape, config, layout) for name, shape in canonical_parameters(config).items()}


def _parameter(name: str, shape: tuple[int, ...], config: ModelConfig, layout: Layout) -> Parameter:
    module, _, suffix = name.rpartition(".")
    pieces = pieces_of(module, shape[0], config, layout)
    quantized = config.quantization is not None and is_layer_linear(name)
    stored: Shapes = {}
    for piece in pieces:
        rows = piece.stop - piece.start
        if quantized and config.quantization is not None:
            for part, dims in packed_shapes(config.quantization, shape[1], rows).items():
                stored[f"{piece.stored}.{part}"] = dims
        else:
            stored[f"{piece.stored}.{suffix}"] = (rows, *shape[1:])
    return Parameter(name, shape, pieces, quantized, stored)


def packed_shapes(quantization: Quantization, in_features: int, out_features: int) -> Shapes:
    """The tensors of one quantized layer: see `qwenfit.checkpoint.gptq` for how they are packed."""
    bits = quantization.bits
    groups = 1 if quantization.group_size == -1 else math.ceil(in_features / quantization.group_size)
    zeros_and_scales: Shapes = {"qzeros": (groups, out_features * bits // 32), "scales": (groups, out_features)}
    if quantization.method == "awq":
        return {"qweight": (in_features, out_features * bits // 32), **zeros_and_scales}
    return {"qweight": (in_features * bits // 32, out_features), **zeros_and_scales, "g_idx": (in_features,)}


def surplus_tensors(config: ModelConfig, gguf: bool, parameters: Mapping[str, Parameter]) -> Shapes:
    """Tensors that may be there though the network has no place for them; what they hold is checked when loading.

    AutoGPTQ stores a bias for every layer, zero where the architecture has none; some exporters store a tied head.
    """
    surplus: Shapes = {}
    for parameter in parameters.values():
        if parameter.quantized and f"{parameter.module}.bias" not in parameters:
            surplus.update({f"{piece.stored}.bias": (piece.stop - piece.start,) for piece in parameter.pieces})
    if config.tie_word_embeddings:
        (head,) = pieces_of("lm_head", config.vocab_size, config, layout_of(config, gguf))
        surplus[f"{head.stored}.weight"] = (config.vocab_size, config.hidden_size)
    return surplus


def check_layers(path: str, tensors: Mapping[str, TensorInfo], config: ModelConfig) -> None:
    """A config that announces more layers than the file has tensors is refused before its layers are listed."""
    if config.num_layers > len(tensors):
        raise BadFile(f"{path} holds {len(tensors)} tensors, too few for the {config.num_layers} layers of its config.")


def check_tensors(
    path: str,
    tensors: Mapping[str, TensorInfo],
    expected: Shapes,
    surplus: Shapes,
    is_floating: Callable[[str], bool],
    architecture: str,
) -> None:
    """Raises BadFile naming the first tensor and the count when the stored tensors are not the expected ones."""
    allowed = {**surplus, **expected}
    if missing := [name for name in expected if name not in tensors]:
        raise BadFile(
            f"{path} lacks {len(missing)} of the {len(expected)} tensors of its {architecture} model, "
            f"first {missing[0]}."
        )
    if extra := [name for name in tensors if name not in allowed and not IGNORED.fullmatch(name)]:
        raise BadFile(
            f"{path} holds {len(extra)} tensors that its {architecture} model does not have, first {shown(extra[0])}."
        )
    present = [name for name in allowed if name in tensors]
    if wrong := [name for name in present if tensors[name].shape != allowed[name]]:
        raise BadFile(
            f"{path} has {len(wrong)} tensors of another shape than its config asks for, first {wrong[0]}: "
            f"{list(tensors[wrong[0]].shape)} instead of {list(allowed[wrong[0]])}."
        )
    packed = (".qweight", ".qzeros", ".g_idx")
    if untyped := [n for n in present if not (tensors[n].dtype == "int32" if n.endswith(packed) else is_floating(n))]:
        raise BadFile(
            f"{path} has {len(untyped)} tensors of a type that cannot be used there, first {untyped[0]} "
            f"({tensors[untyped[0]].dtype})."
        )
