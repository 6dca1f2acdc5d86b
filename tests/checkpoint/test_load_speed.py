"""Loading is as fast as reading: what a user waits for is the file, not what is made of it."""

import mmap
import time
from statistics import median

import pytest
import torch
from models import qwen2_config, qwen2_tensors, write_model, write_random_gguf

from qwenfit.checkpoint import headers_safetensors
from qwenfit.checkpoint.load import load_model
from qwenfit.kernels import gguf_blocks

ROUNDS = range(3, 60)  # at least and at most
SHARE = 0.7  # of the speed of reading the file into memory
CONFIG = qwen2_config(
    hidden_size=1024, intermediate_size=4096, num_hidden_layers=6, num_attention_heads=16, vocab_size=16_000
)


def seconds(work) -> float:
    started = time.perf_counter()
    kept = work()
    taken = time.perf_counter() - started
    del kept
    return taken


@pytest.mark.timing
def test_loading_is_as_fast_as_reading_the_file_into_memory(tmp_path):
    """Both from the page cache into fresh memory, in turns, the median of each: what else runs here slows both."""
    tensors = qwen2_tensors(CONFIG)
    for name, shards in (("one", 1), ("sharded", 3)):
        folder = write_model(tmp_path / name, CONFIG, tensors, shards)
        files = sorted(folder.glob("*.safetensors"))
        share = share_of_reading(files, lambda folder=folder: load_model(folder))
        print(f"\n{name}: {share:.2f} of the speed of reading {sum(f.stat().st_size for f in files) / 1e6:.0f} MB")
        assert share >= SHARE


def fresh_bytes(file) -> mmap.mmap:
    """Read into pages of the usual size: now and then the system has huge ones, which take a fifth of the time."""
    memory = mmap.mmap(-1, file.stat().st_size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    with file.open("rb", buffering=0) as source:
        assert source.readinto(memory) == len(memory)
    return memory


def share_of_reading(files, load) -> float:
    read, loaded = [], []
    for done in range(1, ROUNDS.stop):
        read.append(seconds(lambda: [fresh_bytes(file) for file in files]))
        loaded.append(seconds(load))
        if done in ROUNDS and median(read) / median(loaded) >= SHARE:
            break
    return median(read) / median(loaded)


@pytest.mark.timing
@pytest.mark.skipif(not gguf_blocks.usable(), reason="needs a C compiler")
def test_a_gguf_becomes_bf16_as_fast_as_a_file_of_that_size_is_read(tmp_path):
    """A quantized file is a third of what it becomes: memory that has to be written however fast it is read."""
    pytest.importorskip("gguf")
    file = write_random_gguf(tmp_path / "m.gguf", CONFIG, ["Q4_K", "Q5_0", "Q6_K", "Q8_0"])
    plain = write_model(tmp_path / "plain", CONFIG, qwen2_tensors(CONFIG)) / "model.safetensors"
    share = share_of_reading([plain], lambda: load_model(file, precision="bf16"))
    print(f"\n{file.stat().st_size / 1e6:.0f} MB of GGUF: {share:.2f} of the speed of reading bf16 weights")
    assert share >= SHARE


def test_headers_are_read_once(tmp_path, monkeypatch):
    """From the name to the weights; the checked headers travel in the config."""
    calls = []
    original = headers_safetensors.read_safetensors_header

    def counted(path):
        calls.append(path)
        return original(path)

    monkeypatch.setattr(headers_safetensors, "read_safetensors_header", counted)
    config = qwen2_config()
    load_model(write_model(tmp_path / "m", config, qwen2_tensors(config, torch.bfloat16), shards=3))
    assert sorted(path.name for path in calls) == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
