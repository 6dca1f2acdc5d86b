"""product.cu, compiled for a CPU with a Hopper's instructions emulated (emulated_hopper.h), against its reference."""

from __future__ import annotations

import contextlib
import ctypes
import types
from pathlib import Path

import pytest
import torch

from tests.kernels.emulated_hopper import Map, emulated
from tests.kernels.triton_cases import error, poisoned, random

pytest.importorskip("triton")
from qwenfit.catalog import dense_model_names
from qwenfit.checkpoint.resolve import resolve_model
from qwenfit.kernels.choice import HOPPER_ROWS, TILES_ROWS
from qwenfit.kernels.hopper import compiled, product
from qwenfit.kernels.hopper.instructions import wgmma
from qwenfit.kernels.hopper.product import Layout, chosen, has_hopper_product
from qwenfit.kernels.triton.bf16_matvec import bf16_matvec_reference

CORES = 132
MAIN = """
extern "C" void run(TensorMap* x, TensorMap* w, void* y, const u16* bias, int rows, int outputs, int blocks, int jobs,
                    int brought, int grid, int bytes) {
    run_clusters(grid, SPLITS, THREADS + 64, THREADS, bytes,
                 [=] { hopper_product(*x, *w, y, bias, rows, outputs, blocks, jobs, brought); });
}
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


def multiply(
    folder: Path,
    layout: Layout,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    gated: bool = False,
    add: bool = False,
    cores: int = 2,
    early: bool = True,
) -> None:
    (rows, inputs), (out, _), outputs = x.shape, weight.shape, y.shape[1]
    text = product.source(layout, gated, y.dtype == torch.float32, add, bias is not None, early)
    brought = -(-rows // 8) * 8
    map_x = Map(x.data_ptr(), inputs, rows, inputs, brought)
    map_w = Map(weight.data_ptr(), inputs, out, inputs, layout.columns // (2 if gated else 1))
    numbers = rows, outputs, -(-inputs // 64), layout.tiles(outputs, gated), brought
    programs = layout.programs(outputs, gated, cores)
    emulated(folder, text, MAIN, wgmma(layout.columns)).run(
        ctypes.byref(map_x), ctypes.byref(map_w), ctypes.c_void_p(y.data_ptr()),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()), *numbers, programs, layout.shared,
    )  # fmt: skip


def operands(rows: int, inputs: int, out: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, weight, bias = (random(*s, dtype=torch.bfloat16) for s in ((rows, inputs), (out, inputs), (out,)))
    return x, (weight * inputs**-0.5).contiguous(), bias


@pytest.mark.parametrize(
    ("layout", "rows", "inputs", "out"),
    [
        (Layout(64, 32), 33, 200, 96),  # tiles that one program takes in turn, and inputs that end within a block
        (Layout(96, 40), 90, 72, 120),
        (Layout(128, 48), 100, 1800, 256),  # more blocks than shared memory holds, a last tile that overlaps
        (Layout(160, 48), 129, 328, 104),
        (Layout(192, 88), 192, 64, 184),
        (Layout(64, 64, 4), 64, 576, 160),
        (Layout(128, 64, 3), 128, 576, 168),
        (Layout(192, 32, 2), 185, 200, 64),
    ],
    ids=str,
)
def test_rows_times_a_weight(folder: Path, layout: Layout, rows: int, inputs: int, out: int) -> None:
    x, weight, bias = operands(rows, inputs, out)
    if layout.groups == 2:
        y = poisoned(rows, out, dtype=torch.bfloat16)
        multiply(folder, layout, x, weight, bias, y)
        assert error(y, bf16_matvec_reference(x.float(), weight, bias)) < 3e-3
    else:
        y = poisoned(rows, out)
        multiply(folder, layout, x, weight, bias, y)
        assert error(y, bf16_matvec_reference(x.float(), weight, bias)) < 1e-6


@pytest.mark.parametrize("layout", [Layout(64, 40), Layout(160, 64, 2)], ids=str)
def test_the_sum_with_the_residual_takes_its_place(folder: Path, layout: Layout) -> None:
    rows, inputs, out = layout.rows - 3, 456, 168
    x, weight, _ = operands(rows, inputs, out)
    total = random(rows, out, seed=1)
    expected = total + x.float() @ weight.float().T
    multiply(folder, layout, x, weight, None, total, add=True, early=False)
    assert error(total, expected) < 1e-6


@pytest.mark.parametrize(
    ("layout", "rows", "inputs", "outputs"),
    [(Layout(64, 48), 40, 200, 72), (Layout(128, 32), 128, 1200, 80), (Layout(192, 64), 161, 136, 40)],
    ids=str,
)
def test_the_gate_is_part_of_the_product(folder: Path, layout: Layout, rows: int, inputs: int, outputs: int) -> None:
    x, weight, bias = operands(rows, inputs, 2 * outputs)
    given, dtype = (bias, torch.float32) if layout.groups == 2 else (None, torch.bfloat16)
    y = poisoned(rows, outputs, dtype=dtype)
    multiply(folder, layout, x, weight, given, y, gated=True)
    expected = bf16_matvec_reference(x.float(), weight, given, gated=True)
    assert error(y, expected) < (3e-3 if dtype == torch.bfloat16 else 1e-6)


def test_what_follows_the_result_in_memory_is_left_alone(folder: Path) -> None:
    x, weight, _ = operands(50, 64, 96)
    memory = torch.full((52, 96), 7.0)
    multiply(folder, Layout(64, 40), x, weight, None, memory[1:51])
    assert bool((memory[0] == 7).all() and (memory[51] == 7).all())


def weights_of_every_model() -> set[tuple[int, int, bool]]:
    """Inputs, out and gate of every product of every model that qwenfit knows."""
    found = set()
    for name in dense_model_names():
        config = resolve_model(name)
        attention = config.num_heads * config.head_dim
        found |= {
            (config.hidden_size, attention + 2 * config.num_kv_heads * config.head_dim, False),
            (attention, config.hidden_size, False),
            (config.hidden_size, 2 * config.intermediate_size, True),
            (config.intermediate_size, config.hidden_size, False),
            (config.hidden_size, config.vocab_size, False),
        }
    return found


def test_the_layout_of_every_product_of_every_model_fits_the_card() -> None:
    for inputs, out, gated in weights_of_every_model() | {(64, 512, False), (1024, 512, False), (64, 512, True)}:
        for rows in range(TILES_ROWS[1] + 1, HOPPER_ROWS + 1):
            layout = chosen(rows, inputs, out, gated, CORES)
            case = rows, inputs, out, gated, layout
            outputs = out // (2 if gated else 1)
            assert rows <= layout.rows <= HOPPER_ROWS and layout.blocks >= 4, case
            assert layout.shared <= 227 << 10 and layout.columns % (16 if gated else 8) == 0, case
            assert 64 * layout.groups - layout.rows <= layout.columns <= min(256, out), case
            assert layout.splits == 1 or 256 * layout.groups * (layout.columns + 8) <= layout.shared, case
            assert layout.splits == 1 or layout.programs(outputs, gated, CORES) <= CORES, case
            assert layout.splits <= -(-inputs // 64) and layout.tiles(outputs, gated) * layout.columns >= out, case


def test_where_it_is_missing_it_says_why_and_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not has_hopper_product(torch.zeros(512, 64, dtype=torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.version, "cuda", "1.0")
    compiled._nvrtc.cache_clear()
    product.why_not.cache_clear()
    assert product.why_not(torch.device("cuda", 0)) == "no libnvrtc.so.1"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    product.why_not.cache_clear()
    assert "Hopper" in product.why_not(torch.device("cuda", 0))
    product.why_not.cache_clear()


def test_a_file_of_the_cache_that_cannot_be_loaded_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "_nvrtc", lambda: types.SimpleNamespace(nvrtcVersion=lambda *_: 0))
    monkeypatch.setattr(compiled, "_compile", lambda library, source, name: b"code")
    folder = tmp_path / "qwenfit" / "cuda"

    def load(binary: bytes, *_: object) -> str:
        if binary != b"code":
            raise RuntimeError("CUDA driver: invalid image")
        return "loaded"

    monkeypatch.setattr(compiled, "Kernel", load)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    for _ in range(3):
        product._kernel.cache_clear()
        device = torch.device("cuda", 0)
        assert product._kernel(Layout(64, 64), False, False, False, False, True, device) == "loaded"
        (file,) = folder.iterdir()
        assert file.read_bytes() == b"code"
        file.write_bytes(b"")  # as a machine leaves it that goes down
    product._kernel.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [33, 64, 96, 130, 192])
def test_on_the_card_itself(rows: int) -> None:
    for inputs, out, gated in ((4096, 12288, False), (1024, 512, False), (2048, 4096, False), (1000, 11008, True)):
        x, weight, bias = (t.cuda() for t in operands(rows, inputs, out))
        if not has_hopper_product(weight):
            pytest.skip(product.why_not(weight.device))
        y = product.hopper_product(x, weight, bias, gated=gated)
        assert error(y, bf16_matvec_reference(x.float(), weight, bias, gated=gated)) < 3e-3
