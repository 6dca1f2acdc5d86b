"""Other engines on the same prompts: transformers on the same weights, llama.cpp on the same file.

Each peer is a name and a function from prompts and a number of tokens to times and token ids.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwenfit.bench.run import Timed

if TYPE_CHECKING:
    import torch

    from qwenfit.engine.llm import LLM

Answers = tuple[Timed, list[list[int]]]


@dataclass(frozen=True)
class Peer:
    """`run(prompts, generate)` gives times and greedy token ids. `what` says which weights it runs on."""

    name: str
    what: str
    run: Callable[[list[list[int]], int], Answers]


def find_peers(llm: LLM, model: str, batch: int) -> tuple[list[Peer], list[str]]:
    """The peers that are installed and can run this, and a sentence for each that does not."""
    makers: list[tuple[str, Callable[[], Peer]]] = [("transformers", lambda: transformers_peer(llm))]
    notes: list[str] = []
    if not model.endswith(".gguf"):
        notes.append("llama.cpp is left out: it reads .gguf files.")
    elif batch > 1:
        notes.append("llama.cpp is left out: it is compared with one request at a time.")
    else:
        makers.append(("llama_cpp", lambda: llama_peer(llm, model)))
    peers = []
    for package, make in makers:
        if importlib.util.find_spec(package) is None:
            notes.append(f"{package} is not installed: pip install {package.replace('_cpp', '-cpp-python')}")
        elif package == "llama_cpp" and (fault := llama_fault(model, llm.device)):
            notes.append(f"llama.cpp is left out: {fault}")
        else:
            peers.append(make())
    return peers, notes


def transformers_peer(llm: LLM) -> Peer:
    """Qwen2ForCausalLM (or Qwen3) on our network's own weights, in its own dtype; packed ones are dequantised."""
    import torch

    network = as_transformers(llm)
    dtype = str(network.dtype).removeprefix("torch.")

    def generate(ids: torch.Tensor, tokens: int) -> tuple[float, torch.Tensor]:
        _wait(llm)
        began = time.perf_counter()
        out = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        _wait(llm)
        return time.perf_counter() - began, out

    def run(prompts: list[list[int]], tokens: int) -> Answers:
        ids = torch.tensor(prompts, device=llm.device)
        first, _ = generate(ids, 1)
        whole, out = generate(ids, tokens)
        answers = out[:, ids.shape[1] :].tolist()
        decode = (tokens - 1) / (whole - first) if tokens > 1 and whole > first else 0.0
        return Timed(first, decode, len(prompts) * tokens / whole), answers

    return Peer(f"transformers {importlib.metadata.version('transformers')}", f"the same weights, {dtype}", run)


def as_transformers(llm: LLM) -> Any:
    """Our network as a transformers model; plain weights are shared, not copied."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from qwenfit.checkpoint.names import QWEN2, canonical_parameters, pieces_of
    from qwenfit.checkpoint.save import hf_config
    from qwenfit.kernels.linear import dequantize
    from qwenfit.model.transformer import Transformer

    model, config = llm.engine.runner.model, llm.config
    assert isinstance(model, Transformer)
    table = hf_config(config, str(model.dtype).removeprefix("torch."))
    settings = AutoConfig.for_model(**{k: v for k, v in table.items() if k != "torch_dtype"})
    loader: Any = AutoModelForCausalLM
    with torch.device("meta"):
        made = loader.from_config(settings, dtype=model.dtype)
    state: dict[str, torch.Tensor] = {}
    for name, shape in canonical_parameters(config).items():
        module, _, leaf = name.rpartition(".")
        owner = model.get_submodule(module)
        packed = getattr(owner, "packed", None) if leaf == "weight" else None
        whole = getattr(owner, leaf).detach() if packed is None else dequantize(packed, model.dtype).to(llm.device)
        for piece in pieces_of(module, shape[0], config, QWEN2):
            state[f"{piece.stored}.{leaf}"] = whole[piece.start : piece.stop]
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    made.load_state_dict(state, assign=True)
    with torch.device(llm.device):  # its tables are no weights, and were not made on the meta device
        made.model.rotary_emb = type(made.model.rotary_emb)(settings)
    return made.eval()


LLAMA_TRIAL = """
import sys, llama_cpp
path, layers = sys.argv[1], int(sys.argv[2])
llama_cpp.Llama(model_path=path, n_ctx=256, n_gpu_layers=layers, verbose=False).eval([1] * 64)
"""


def llama_fault(path: str, device: str) -> str:
    """Why llama.cpp cannot run this file here, tried in a process of its own: a wrong instruction would end ours."""
    command = [sys.executable, "-c", LLAMA_TRIAL, path, "-1" if device.startswith("cuda") else "0"]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode == -signal.SIGILL:
        return (
            "an instruction that this machine lacks ended it; without this CPU's own it runs: "
            "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install --force-reinstall --no-cache-dir llama-cpp-python"
        )
    said = (done.stderr.strip().splitlines() or [""])[-1]
    return f"it ended with {done.returncode}. {said}".strip() if done.returncode else ""


def llama_peer(llm: LLM, path: str) -> Peer:
    """llama.cpp on the file itself, one request at a time, with as many threads; on a GPU all layers there."""
    import llama_cpp  # type: ignore[import-not-found, unused-ignore]
    import torch

    threads = torch.get_num_threads()
    model: Any = llama_cpp.Llama(
        model_path=path,
        n_ctx=llm.max_model_len,
        n_threads=threads,
        n_threads_batch=threads,
        n_gpu_layers=-1 if llm.device.startswith("cuda") else 0,
        verbose=False,
    )

    def run(prompts: list[list[int]], tokens: int) -> Answers:
        (prompt,) = prompts
        model.reset()
        began = time.perf_counter()
        model.eval(prompt)
        answer = [int(model.sample(temp=0.0))]
        first = time.perf_counter() - began
        while len(answer) < tokens:
            model.eval(answer[-1:])
            answer.append(int(model.sample(temp=0.0)))
        whole = time.perf_counter() - began
        decode = (tokens - 1) / (whole - first) if tokens > 1 else 0.0
        return Timed(first, decode, tokens / whole), [answer]

    return Peer(f"llama.cpp {llama_cpp.__version__}", "the file's own quantization", run)


def _wait(llm: LLM) -> None:
    if llm.device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
