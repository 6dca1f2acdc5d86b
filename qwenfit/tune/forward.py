"""The forward pass of training: hidden states of a micro-batch, with a choice of what is kept for the backward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from qwenfit.model.attention import Context, FullContext
from qwenfit.model.transformer import Transformer
from qwenfit.tune.adapters import device_of, head_weight, token_rows
from qwenfit.tune.batch import IGNORE, TrainBatch, segment_lengths, targets_of
from qwenfit.tune.loss import linear_cross_entropy
from qwenfit.tune.offload import embed, offload_saved_tensors, to_device

# What the backward pass finds instead of computing it again, from least memory to most.
KEEP = {
    "inputs": "each layer's input: least memory, the layer runs twice",
    "attention": "each layer's input and attention output: attention, which grows with the square, runs once",
    "all": "everything: nothing runs twice",
}
_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._flash_attention_forward.default,
)


def batch_loss(
    model: Transformer,
    batch: TrainBatch,
    divisor: float,
    *,
    keep: str = "inputs",
    offload: bool = False,
    head_sink: Tensor | None = None,
    fuse: bool = True,
    nest: bool = True,
) -> Tensor:
    """Cross entropy of the batch's trained tokens, summed, over `divisor`: float32 scalar, differentiable.

    keep: one of KEEP. offload: what is kept waits in host memory (CUDA). head_sink: see `linear_cross_entropy`.
    fuse: on a GPU blocks run in the kernels of tune/fused.py, which read weights without calling their modules.
    nest: fused blocks that run twice do so in backward passes of their own, which hooks of shards do not expect.
    """
    device = device_of(model)
    targets = targets_of(batch).flatten()
    trained = (targets != IGNORE).nonzero().flatten()
    hidden = hidden_states(model, batch, keep=keep, offload=offload, fuse=fuse, nest=nest)
    rows = token_rows(model)
    return linear_cross_entropy(
        hidden.index_select(0, to_device(trained, device)),
        head_weight(model),
        to_device(targets[trained], device),
        divisor,
        sink=head_sink,
        rows=None if rows is None else rows.head_rows,
        row_ids=None if rows is None else rows.token_ids,
    )


def hidden_states(
    model: Transformer,
    batch: TrainBatch,
    *,
    keep: str = "inputs",
    offload: bool = False,
    fuse: bool = True,
    nest: bool = True,
) -> Tensor:
    """[B * S, hidden] after the final norm. NTK and LogN are off, as in Qwen-1's own training code."""
    device = device_of(model)
    rows, length = batch.input_ids.shape
    positions = to_device(batch.position_ids.flatten(), device)
    angles = model.rotary.angles(positions, [length] * rows, [1.0] * rows, 0, model.dtype)
    lengths = segment_lengths(batch)
    # Right padding needs no mask: what is real never looks ahead, and padding is not trained.
    context: Context = FullContext(rows, None) if lengths is None else SegmentContext(lengths, device)
    x = embed(model.embed_tokens, batch.input_ids.flatten(), device)
    if (trained := token_rows(model)) is not None:
        x = trained.pull(x, to_device(batch.input_ids.flatten(), device))
    again = keep != "all" and torch.is_grad_enabled()
    nested = again and keep == "inputs" and nest and fuse and fusible(device)
    # use_reentrant False: the only kind that saved-tensor hooks and frozen inputs work with.
    how: Any = {"use_reentrant": False}
    if keep == "attention":
        how["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
    with offload_saved_tensors(device) if offload else nullcontext():
        for layer, fused in zip(model.layers, _fused_blocks(model, device, fuse, nested), strict=True):
            if again and not nested:
                # Fused blocks draw from seeds of their own, so that nothing must be put back for the second time.
                x = checkpoint(layer, x, angles, context, fused, preserve_rng_state=fused is None, **how)
            else:
                x = layer(x, angles, context, fused)
    out: Tensor = model.norm(x)
    return out


def fusible(device: torch.device) -> bool:
    """Whether blocks run in the kernels of tune/fused.py: on a GPU."""
    return device.type == "cuda"


def _fused_blocks(
    model: Transformer, device: torch.device, fuse: bool, nested: bool
) -> list[Callable[..., Tensor] | None]:
    """For each layer, how it shall be computed; None: as it says itself."""
    if not fuse or not fusible(device):
        return [None] * len(model.layers)
    from qwenfit.tune.fused import SEEDS, run_block, run_block_twice

    seeds = torch.randint(SEEDS, (len(model.layers),)).tolist()
    if nested:
        trained = torch.empty(0, device=device, requires_grad=True)
        return [functools.partial(run_block_twice, trained=trained, seed=seed) for seed in seeds]
    return [functools.partial(run_block, seed=seed) for seed in seeds]


def _keep_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE


class SegmentContext:
    """Causal attention within each of several segments that lie end to end, and none between them."""

    centred = False

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        """lengths: of the segments; they sum to the tokens of the step."""
        self.lengths = lengths
        ends = torch.tensor([0, *lengths]).cumsum(0)
        self.ends = to_device(ends.int(), device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [T, heads, head_dim], k and v [T, kv_heads, head_dim] -> [T, heads * head_dim]."""
        if q.is_cuda and q.dtype != torch.float32:
            # What torch's varlen_attn calls; that has grouped heads only since torch 2.12.
            longest = max(self.lengths)
            out: Tensor = torch.ops.aten._flash_attention_forward(
                q, k, v, self.ends, self.ends, longest, longest, 0.0, True, False
            )[0]
            return out.flatten(1)
        parts = zip(*(torch.split(t, self.lengths) for t in (q, k, v)), strict=True)
        return torch.cat([_causal(*part) for part in parts])


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)
