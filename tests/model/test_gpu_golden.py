"""Greedy text of the golden models, through the engine and its CUDA graphs on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwenfit.engine.llm import LLM
from qwenfit.engine.params import SamplingParams
from tests.model.util import load_golden

GOLDEN = Path(__file__).parent.parent / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("qwen*/*/decode.safetensors"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_greedy_text_is_that_of_the_original_code(folder: Path) -> None:
    model, stored = load_golden(folder).to("cuda"), load_file(folder / "decode.safetensors")
    llm = LLM.from_parts(model, model.config, None, device="cuda", kv_cache="fp32", num_blocks=64, max_model_len=512)
    prompts = [name.split(".")[0] for name in stored if name.endswith(".input_ids")]
    wanted = [stored[f"{name}.new_ids"].flatten().tolist() for name in prompts]
    params = SamplingParams(max_tokens=len(wanted[0]), temperature=0.0, ignore_eos=True)
    ids = [stored[f"{name}.input_ids"].flatten().tolist() for name in prompts]
    assert [output.token_ids for output in llm.generate(ids, params)] == wanted
