"""Peak memory of loading: the model itself and one tensor, measured in a process of its own."""

import subprocess
import sys

import pytest
import torch
from models import qwen2_config, qwen2_tensors, write_model, write_random_gguf

from qwenfit.checkpoint.headers_gguf import read_gguf_header
from qwenfit.checkpoint.headers_safetensors import read_safetensors_header

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
MIB = 2**20
SLACK = 24 * MIB  # the block of a conversion, and what the allocator keeps
ROUNDING = 48 * MIB  # the pieces in which weights are rounded and packed, a few copies of 16 MiB
CONFIG = qwen2_config(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16, vocab_size=16_000
)
GGUF_TYPES = ["Q4_K", "Q5_0", "Q6_K", "Q8_0"]

# Prints the bytes that the model holds, and by how much the peak of the process grew while it was loaded.
MEASURE = """
import re, sys
from pathlib import Path
from qwenfit.checkpoint.load import load_model

def peak():  # not ru_maxrss: that counts the parent's peak too
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

load_model(sys.argv[1], precision=sys.argv[3])  # a tiny one first: imports, threads, compiled kernels
before = peak()
model, _ = load_model(sys.argv[2], precision=sys.argv[3])
grown = peak() - before
held = sum(p.nbytes for p in model.parameters())
held += sum(m.packed.nbytes for m in model.modules() if getattr(m, "packed", None) is not None)
print(held, grown)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    base = tmp_path_factory.mktemp("memory")
    write_model(base / "tiny", qwen2_config(), qwen2_tensors(qwen2_config()))
    write_model(base / "bfloat16", CONFIG, qwen2_tensors(CONFIG))
    write_model(base / "float32", CONFIG, qwen2_tensors(CONFIG, torch.float32))
    write_random_gguf(base / "tiny.gguf", qwen2_config(hidden_size=512, intermediate_size=512), GGUF_TYPES)
    write_random_gguf(base / "m.gguf", CONFIG, GGUF_TYPES)
    return base


@pytest.mark.parametrize(
    ("stored", "precision"),
    [("bfloat16", "bf16"), ("float32", "bf16"), ("bfloat16", "int8"), ("bfloat16", "int4")],
)
def test_peak_is_the_model_and_one_tensor(folders, stored, precision):
    """A rounded layer is held twice while it is packed: as integers of one byte, and in the kernels' layout."""
    folder = folders / stored
    held, grown = held_and_grown(folders / "tiny", folder, precision)
    file = read_safetensors_header(folder / "model.safetensors")
    largest = max(t.nbytes for t in file.tensors.values())
    limit = held + largest + SLACK + (0 if precision == "bf16" else ROUNDING)
    assert 0.8 * held < grown < limit
    assert limit < held + sum(t.nbytes for t in file.tensors.values())  # the file as a whole would not fit


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_a_gguf_is_never_whole_in_float32(folders, precision):
    held, grown = held_and_grown(folders / "tiny.gguf", folders / "m.gguf", precision)
    largest = max(t.nbytes for t in read_gguf_header(folders / "m.gguf").tensors)
    limit = held + largest + SLACK + (0 if precision == "bf16" else ROUNDING)
    assert 0.8 * held < grown < limit


def held_and_grown(tiny, model, precision):
    command = [sys.executable, "-c", MEASURE, str(tiny), str(model), precision]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    held, grown = map(int, output.split())
    return held, grown
