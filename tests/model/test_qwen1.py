"""Our network gives the logits and tokens of the original Qwen-1 code (tests/golden/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from model.util import Paged, Tensors, load_golden, max_error
from safetensors.torch import load_file

MODELS = ["a_ntk_logn", "b_plain_base1e6", "c_ntk", "d_logn"]
LENGTHS = [10, 64, 65, 100, 128, 129, 200, 300]
TOLERANCE = 1e-4  # float32 noise of the reference itself is up to 5e-5


def reference(golden: Path, model: str, file: str) -> Tensors:
    return load_file(golden / "qwen1" / model / f"{file}.safetensors")


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MODELS)
def test_prefill_logits(golden: Path, name: str, length: int) -> None:
    model, expected = load_golden(golden / "qwen1" / name), reference(golden, name, "prefill")
    ids, rows = expected[f"L{length}.input_ids"].long(), expected[f"L{length}.positions"].long()
    paged = Paged(model, 512)
    logits = paged.run(paged.chunk("s", ids.tolist()))
    assert max_error(logits[rows], expected[f"L{length}.logits"]) < TOLERANCE
    with torch.inference_mode():
        whole = model.logits(model.forward_full(ids[None]))[0]
    assert max_error(whole[rows], expected[f"L{length}.logits"]) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_prompt_in_chunks_keeps_the_alpha_of_the_whole_prompt(golden: Path, name: str, chunk: int) -> None:
    model, expected = load_golden(golden / "qwen1" / name), reference(golden, name, "prefill")
    ids, rows = expected["L129.input_ids"].tolist(), expected["L129.positions"].long()
    paged = Paged(model, 512)
    logits = torch.cat(
        [paged.run(paged.chunk("s", ids[i : i + chunk], prompt_length=129)) for i in range(0, 129, chunk)]
    )
    assert max_error(logits[rows], expected["L129.logits"]) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_of_every_layer(golden: Path, name: str) -> None:
    model, expected = load_golden(golden / "qwen1" / name), reference(golden, name, "prefill")
    inputs: list[torch.Tensor] = []
    for layer in [*model.layers, model.norm]:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.norm.register_forward_hook(lambda _, args, out: inputs.append(out))
    paged = Paged(model, 64)
    paged.run(paged.chunk("s", expected["L10.input_ids"].tolist()))
    del inputs[-2]  # what enters the final norm; the reference keeps what leaves it
    assert max_error(torch.stack(inputs), expected["L10.hidden_states"]) < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_the_cache_holds_rotated_keys_and_plain_values(golden: Path, name: str) -> None:
    model, expected = load_golden(golden / "qwen1" / name), reference(golden, name, "prefill")
    paged = Paged(model, 128, scatter=False)
    chunk = paged.chunk("s", expected["L100.input_ids"].tolist())
    paged.run(chunk)
    cache = paged.cache.layers[0]
    table = torch.tensor(chunk.block_table)
    assert max_error(cache.key[table].flatten(0, 1)[:100], expected["L100.layer0.key"]) < 1e-5
    assert max_error(cache.value[table].flatten(0, 1)[:100], expected["L100.layer0.value"]) < 1e-5


@pytest.mark.parametrize("prompt", [20, 60, 100])
@pytest.mark.parametrize("name", MODELS)
def test_decode_across_the_training_length(golden: Path, name: str, prompt: int) -> None:
    """Prompts of 20, 60 and 100 then 40 tokens: decoding passes 64 and 128 with the alpha of the prompt."""
    model, expected = load_golden(golden / "qwen1" / name), reference(golden, name, "decode")
    new_ids = expected[f"P{prompt}.new_ids"].tolist()
    logits = Paged(model, 512).feed("s", expected[f"P{prompt}.input_ids"].tolist(), new_ids)
    assert max_error(logits, expected[f"P{prompt}.logits"]) < TOLERANCE
    assert logits.argmax(-1).tolist() == new_ids


@pytest.mark.parametrize("lengths", ["long", "short"])
@pytest.mark.parametrize("name", MODELS)
def test_batch_rows_equal_the_rows_alone(golden: Path, name: str, lengths: str) -> None:
    """Three prompts in one step, each with its own alpha, unpadded.

    The reference pads on the left and counts the pads in LogN's position, so its padded rows differ from the same
    rows alone by about 1 when LogN is on: rows are compared with `logits_alone`, and where LogN is off also with the
    padded batch, whose decoding we then follow.
    """
    model, expected = load_golden(golden / "qwen1" / name), reference(golden, name, "batch")
    ids, mask = expected[f"{lengths}.input_ids"], expected[f"{lengths}.attention_mask"].bool()
    prompts = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
    paged = Paged(model, 512)
    logits = paged.run(*(paged.chunk(str(i), prompt) for i, prompt in enumerate(prompts)))
    with torch.inference_mode():
        full = model.logits(model.forward_full(ids.long(), mask))
    same_in_batch = not model.config.use_logn_attn
    for i, rows in enumerate(logits.split([len(p) for p in prompts])):
        kept = expected[f"{lengths}.row{i}.positions"].long()
        assert max_error(rows[kept], expected[f"{lengths}.row{i}.logits_alone"]) < TOLERANCE
        assert max_error(full[i][mask[i]][kept], expected[f"{lengths}.row{i}.logits_alone"]) < TOLERANCE
        if same_in_batch:
            assert max_error(rows[kept], expected[f"{lengths}.row{i}.logits"]) < TOLERANCE
    if same_in_batch:
        new_ids = expected[f"{lengths}.new_ids"]
        last = torch.tensor([len(p) for p in prompts]).cumsum(0) - 1
        steps = [logits[last]]
        for column in new_ids.T[:-1].tolist():
            steps.append(paged.run(*(paged.chunk(str(i), [token]) for i, token in enumerate(column))))
        decoded = torch.stack(steps, dim=1)
        assert max_error(decoded, expected[f"{lengths}.decode_logits"]) < TOLERANCE
        assert torch.equal(decoded.argmax(-1), new_ids.long())


@pytest.mark.parametrize(
    ("name", "prompt"), [("a_ntk_logn", 20), ("a_ntk_logn", 60), ("a_ntk_logn", 100), ("b_plain_base1e6", 20)]
)
def test_qwen1s_own_uint8_cache(golden: Path, name: str, prompt: int) -> None:
    """Truncation turns float noise into whole steps: the reference itself moves by 0.07 (tests/golden/README.md)."""
    model, expected = load_golden(golden / "qwen1" / name), reference(golden, name, "kv_int8")
    new_ids = expected[f"P{prompt}.new_ids"].tolist()
    paged = Paged(model, 256, "qwen1-int8")
    logits = paged.feed("s", expected[f"P{prompt}.input_ids"].tolist(), new_ids)
    assert max_error(logits, expected[f"P{prompt}.logits"]) < 0.1
    assert logits.argmax(-1).tolist() == new_ids
    table, length = torch.tensor(paged.tables["s"]), prompt + len(new_ids) - 1
    for i, cache in enumerate(paged.cache.layers):
        for side, q, affine in (("k", cache.key, cache.key_affine), ("v", cache.value, cache.value_affine)):
            assert affine is not None
            stored = f"P{prompt}.cache.layer{i}.{side}."
            ours = q[table].flatten(0, 1)[:length].transpose(0, 1).int()
            assert (ours - expected[stored + "q"].int()).abs().max() <= 1 + i * 3  # noise grows with depth
            scale, zero = affine[table].flatten(0, 1)[:length].transpose(0, 1).split(1, dim=-1)
            if i == 0:
                assert torch.allclose(scale, expected[stored + "scale"], rtol=1e-5, atol=0)
                assert torch.allclose(zero, expected[stored + "zero"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_alpha_is_that_of_the_reference(golden: Path, name: str) -> None:
    model = load_golden(golden / "qwen1" / name)
    recorded = json.loads((golden / "qwen1" / name / "expected.json").read_text())
    for length, entry in (recorded["prefill"] | recorded["decode"]).items():
        assert model.config.ntk_alpha(int(length)) == entry["ntk_alpha"]


def test_training_mode_has_neither_ntk_nor_logn(golden: Path) -> None:
    """The original switches both off while training: model a then equals itself without them, past 64 tokens."""
    model = load_golden(golden / "qwen1" / "a_ntk_logn")
    ids = reference(golden, "a_ntk_logn", "prefill")["L200.input_ids"].long()[None]
    trained = model.train().forward_full(ids)
    assert trained.requires_grad
    assert max_error(model.eval().forward_full(ids), trained) > 0.1
    plain = Paged(model, 256)
    chunk = plain.chunk("s", ids[0].tolist(), prompt_length=1)  # alpha 1
    object.__setattr__(model.config, "use_logn_attn", False)
    assert max_error(model.logits(trained)[0].detach(), plain.run(chunk)) < TOLERANCE
