"""Any line of options that a person could type ends in an answer, or in one sentence and a next step."""

from __future__ import annotations

import contextlib
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwenfit.cli import main

MODELS = (
    "Qwen-7B",
    "Qwen-72B",
    "qwen2.5-0.5b",
    "Qwen2.5-7B-Instruct-AWQ",
    "Qwen-14B-Chat-Int8",
    "Qwen3-30B-A3B",
    "nope",
)
CARDS = ("3090", "H100", "A100 80GB", "T4", "cpu", "MI300X", "M2 Max 96GB", "EPYC 9004 256GB", "nope", "")
COUNTS = ("1", "2", "8", "512", "40000", "99999999", "0", "-1", "a")
OPTIONS = {
    "--task": ("inference", "full", "lora", "lora-emb", "qlora", "x"),
    "--gpu": CARDS,
    "--network-gbps": ("1", "100", "nan", "inf", "0"),
    "--precision": ("bf16", "fp16", "fp32", "int8", "int4", "x"),
    "--stack": ("qwenfit", "vllm", "transformers-5", "transformers-4.3x", "x"),
    "--parallel": ("layers", "tensor", "x"),
    "--kv-cache": ("bf16", "fp16", "fp32", "int8", "x"),
    "--head-precision": ("int8", "int4", "x"),
    "--optimizer": ("fp32", "bf16", "8bit", "x"),
    "--zero": ("0", "1", "2", "3"),
    "--host-factor": ("1", "2", "0", "nan"),
    "--find": ("context", "batch", "seq-len", "gpu", "precision", "x"),
    "-o": ("md", "csv", "json", "text", "x"),
    **dict.fromkeys(("--gpus", "--nodes", "--context", "--prompt", "--generate", "--batch"), COUNTS),
    **dict.fromkeys(("--shared-prefix", "--seq-len", "--micro-batch", "--grad-accum", "--lora-rank"), COUNTS),
}
FLAGS = ("--flash-attention", "--no-flash-attention", "--no-checkpointing", "--fused-loss", "--full-logits", "--json")
pairs = st.sampled_from(sorted(OPTIONS)).flatmap(lambda o: st.sampled_from(OPTIONS[o]).map(lambda value: [o, value]))
words = st.lists(st.one_of(pairs, st.sampled_from(FLAGS).map(lambda flag: [flag])), max_size=5).map(
    lambda parts: [word for part in parts for word in part]
)


@settings(max_examples=120, deadline=None)
@given(st.none() | st.sampled_from(MODELS), words)
def test_every_line_ends_in_an_answer_or_a_sentence(model: str | None, options: list[str]) -> None:
    out, err = io.StringIO(), io.StringIO()
    line = ["plan", *([model] if model else []), *options]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main(line)
    if end.value.code in (0, 3):
        assert out.getvalue().strip() and not err.getvalue(), line
    else:
        sentence, step = err.getvalue().splitlines()
        assert end.value.code in (2, 4) and not out.getvalue(), line
        assert sentence.startswith("error: ") and step.startswith("  try: "), line
