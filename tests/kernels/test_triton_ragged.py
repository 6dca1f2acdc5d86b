from __future__ import annotations

import pytest
import torch

from tests.kernels.test_triton_attention import BLOCK_SIZE, filled
from tests.kernels.triton_cases import DEVICE, error, random

pytest.importorskip("triton")
from qwenfit.kernels.attention import RaggedStep, paged_attention_reference, write_kv
from qwenfit.kernels.triton.ragged import ragged_attention


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2)])
def test_prompts_chunks_and_single_tokens_in_one_step(heads: int, kv_heads: int, quantized: bool) -> None:
    """A whole prompt, a decoding sequence, and a prompt that goes on."""
    dim, queries, contexts = 16, [7, 1, 5], [7, 10, 13]
    ours, theirs = filled(kv_heads, dim, 20, quantized), filled(kv_heads, dim, 20, quantized)
    tables = torch.randperm(20, generator=torch.Generator().manual_seed(0))[:12].view(3, 4).int()
    slots = [
        int(tables[i, p // BLOCK_SIZE]) * BLOCK_SIZE + p % BLOCK_SIZE
        for i, (n, end) in enumerate(zip(queries, contexts, strict=True))
        for p in range(end - n, end)
    ]
    step = RaggedStep(
        queries, contexts, tables.to(DEVICE), torch.tensor(slots, device=DEVICE), BLOCK_SIZE, torch.float32
    )
    q, k, v = random(13, heads, dim), random(13, kv_heads, dim), random(13, kv_heads, dim, seed=1)
    out = ragged_attention(q, k, v, ours, step, 0.25)
    for cache in (theirs,):
        for name in ("key", "value", "key_affine", "value_affine"):
            if getattr(cache, name) is not None:
                object.__setattr__(cache, name, getattr(cache, name).cpu())
    on_cpu = RaggedStep(queries, contexts, tables, torch.tensor(slots), BLOCK_SIZE, torch.float32)
    write_kv(theirs, k.cpu(), v.cpu(), on_cpu)
    reference = paged_attention_reference(q.cpu(), theirs, on_cpu, 0.25)
    assert error(out.cpu(), reference) < (2e-3 if quantized else 1e-5)
