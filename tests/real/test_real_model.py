"""Qwen2.5-Coder-0.5B-Instruct: transformers' tokens, code that runs, Chinese, and company that changes nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qwenfit.engine.llm import LLM
from qwenfit.engine.params import SamplingParams

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]  # minutes on a busy machine

PROMPTS = [
    "Write a Python function that reverses a string.",
    "用一句话介绍长城。",
    "What is the capital of France?",
    "Explain what a mutex is, briefly.",
    "SELECT name FROM users WHERE",
    "Translate to German: The weather is nice today.",
    "Write a haiku about the sea.",
    "def fibonacci(n):",
    "List three prime numbers above 100.",
    "什么是递归？请举例说明。",
]
# llama.cpp's names of what Qwen2 calls otherwise (gguf-py, constants.py, MODEL_ARCH.QWEN2).
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
INNER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def transformers_model(path: Path) -> Any:
    """transformers' Qwen2 on the weights as the gguf package dequantises them: none of our readers takes part."""
    transformers = pytest.importorskip("transformers")
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[f"qwen2.{name}"].contents()

    state = {}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            name = f"model.layers.{parts[1]}.{INNER[parts[2]]}.{parts[3]}"
        else:
            name = f"{OUTER[parts[0]]}.{parts[1]}"
        plain = gguf.dequantize(tensor.data, tensor.tensor_type)
        state[name] = torch.from_numpy(np.require(plain, np.float32, "W"))  # copies what is float32 in the file
    config = transformers.Qwen2Config(
        vocab_size=len(state["model.embed_tokens.weight"]),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_theta=field("rope.freq_base"),
        max_position_embeddings=field("context_length"),
        tie_word_embeddings="lm_head.weight" not in state,
    )
    config.rope_parameters = {"rope_type": "default", "rope_theta": field("rope.freq_base")}
    with torch.device("meta"):
        model = transformers.Qwen2ForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table, which no checkpoint holds, was on meta
    return model.eval()


def ask(real: LLM, text: str) -> list[int]:
    return real.tokenizer.apply_chat_template([{"role": "user", "content": text}])


def test_64_greedy_tokens_of_10_prompts_are_those_of_transformers(real: LLM, real_gguf: Path) -> None:
    """Each of our tokens is transformers' argmax after the same tokens: by induction, its own greedy answer."""
    theirs = transformers_model(real_gguf)
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    outputs = real.generate([ask(real, prompt) for prompt in PROMPTS], params)
    for output in outputs:
        prompt, answer = output.prompt_token_ids, output.token_ids
        assert len(answer) == 64
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt + answer[:-1]]), logits_to_keep=64).logits[0]
        real_rows = logits[:, : real.engine.vocab_size]  # the others are no token
        assert answer == real_rows.argmax(-1).tolist(), output.text


def test_the_function_it_writes_reverses_a_string(real: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=200)
    text = real.chat([{"role": "user", "content": PROMPTS[0]}], params).text
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found, text
    name = re.search(r"def (\w+)\(", found[1])
    assert name, text
    check = f"\nassert {name[1]}('hello, 世界!') == '!界世 ,olleh' and {name[1]}('') == ''\nprint('right')\n"
    limits = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))\n"
    limits += "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\nresource.setrlimit(resource.RLIMIT_NPROC, (0, 0))\n"
    command = [sys.executable, "-I", "-S", "-c", limits + found[1] + check]
    ran = subprocess.run(command, env={}, capture_output=True, text=True, timeout=10)
    assert ran.stdout.endswith("right\n"), (text, ran.stderr)


def test_a_chinese_question_gets_a_chinese_answer(real: LLM) -> None:
    output = real.chat([{"role": "user", "content": PROMPTS[1]}], SamplingParams(temperature=0, max_tokens=60))
    chinese = sum("\u4e00" <= c <= "\u9fff" for c in output.text)
    assert "长城" in output.text and chinese > 0.7 * len(output.text), output.text
    assert output.finish_reason == "stop" and "�" not in output.text


def test_32_requests_at_once_get_what_each_gets_alone(real: LLM) -> None:
    prompts = [real.tokenizer.encode(f"{number}. {prompt}") for number in range(4) for prompt in PROMPTS][:32]
    params = [SamplingParams(temperature=0, max_tokens=2 + i % 3, ignore_eos=True) for i in range(32)]
    together = real.generate(prompts, params)
    for prompt, wanted, output in zip(prompts, params, together, strict=True):
        assert real.generate([prompt], wanted, cache_salt="alone")[0].token_ids == output.token_ids
