from __future__ import annotations

import pytest
import torch

from tests.kernels.triton_cases import DEVICE, error, poisoned, random

pytest.importorskip("triton")
from qwenfit.bench.gpu_kernels import SHAPES, int_configs, once_each
from qwenfit.kernels.triton.int_matvec import (
    BlockedWeight,
    int_matvec,
    int_matvec_reference,
    pack_blocked,
    unpack_blocked,
)
from qwenfit.kernels.triton.layout import pack_codes, unpack_codes
from qwenfit.quantize.types import QuantizedWeight

SMALL = {"rows": 4, "words": 32, "warps": 1, "programs": 99}


def quantized(bits: int, out: int, inputs: int, group: int, zeros: str = "middle", perm: bool = False):
    generator = torch.Generator().manual_seed(bits * out + inputs)
    q = torch.randint(0, 2**bits, (out, inputs), dtype=torch.uint8, generator=generator)
    groups = -(-inputs // group)
    scales = torch.rand(out, groups, generator=generator) * 0.05 + 0.01
    if zeros == "middle":
        points = torch.full((out, groups), float(2 ** (bits - 1)))
    else:
        points = torch.rand(out, groups, generator=generator) * (2**bits - 1)
        if zeros in ("whole", "narrow"):
            points = points.round()
    order = torch.randperm(inputs, generator=generator) if perm else None
    return QuantizedWeight(bits, group, q, scales, points, order)


def packed_for(zeros: str, weight: QuantizedWeight) -> BlockedWeight:
    """Laid out beside float32, or beside 16 bits, where "narrow" zeros and their scales have as many."""
    packed = pack_blocked(weight, torch.bfloat16 if zeros == "narrow" else torch.float32, DEVICE)
    assert packed is not None
    kinds = {"middle": torch.float32, "narrow": torch.int32, "whole": torch.int64, "fractions": torch.int64}
    assert packed.scales.dtype == kinds[zeros]
    return packed


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_the_layout_can_be_undone(bits: int, block: int) -> None:
    q = torch.randint(0, 2**bits, (3, 300), dtype=torch.uint8)
    packed = pack_codes(q, bits, block)
    assert packed.numel() * 4 <= 3 * (-(-300 // block) * block) * bits // 8
    assert torch.equal(unpack_codes(packed, bits, block, 300), q)


@pytest.mark.parametrize("zeros", ["middle", "whole", "fractions"])
@pytest.mark.parametrize("bits", [4, 8])
def test_packing_keeps_the_weight(bits: int, zeros: str) -> None:
    weight = quantized(bits, 5, 256, 64, zeros)
    packed = pack_blocked(weight, torch.float32, DEVICE)
    assert packed is not None
    assert torch.equal(unpack_blocked(packed).dequantize().cpu(), weight.dequantize())
    narrow = pack_blocked(weight, torch.bfloat16, DEVICE)
    assert narrow is not None
    kinds = {"middle": torch.float16, "whole": torch.int32, "fractions": torch.int64}
    assert narrow.scales.dtype == kinds[zeros] and narrow.has_zeros == (zeros != "middle")
    assert error(unpack_blocked(narrow).dequantize().cpu(), weight.dequantize()) < 2**-11


def test_zeros_that_are_no_codes_are_float32() -> None:
    weight = quantized(4, 4, 128, 128, "whole")
    weight.zeros[0] = 200
    packed = pack_blocked(weight, torch.bfloat16, DEVICE)
    assert packed is not None and packed.scales.dtype == torch.int64
    assert error(unpack_blocked(packed).dequantize().cpu(), weight.dequantize()) < 2**-11


def test_a_scale_that_float16_would_lose_stays_float32() -> None:
    weight = quantized(4, 4, 128, 128)
    weight.scales[0] = 1e-7
    packed = pack_blocked(weight, torch.bfloat16, DEVICE)
    assert packed is not None and packed.scales.dtype == torch.float32


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("out", "inputs", "group", "zeros", "perm"),
    [
        (7, 256, 128, "middle", False),
        (9, 384, 128, "whole", False),
        (5, 96, 32, "fractions", False),
        (6, 192, 64, "middle", True),
        (3, 200, 1024, "whole", False),  # one group to a row, padded to whole blocks
        (5, 640, 128, "middle", False),  # the last tile of a row is not full
        (9, 384, 128, "narrow", False),
    ],
)
def test_a_row_times_an_integer_weight(bits: int, out: int, inputs: int, group: int, zeros: str, perm: bool) -> None:
    packed = packed_for(zeros, quantized(bits, out, inputs, group, zeros, perm))
    x, bias, residual = random(1, inputs), random(out), random(1, out, seed=1)
    y = int_matvec(x, packed, bias, residual, out=poisoned(1, out), config=SMALL)
    assert error(y, int_matvec_reference(x, packed, bias, residual)) < 3e-4


@pytest.mark.parametrize("early", [0, 1])
@pytest.mark.parametrize("words", [16, 64])  # a part of x at a time, and all of it though some words are not there
@pytest.mark.parametrize("bits", [4, 8])
def test_a_program_takes_several_tiles(bits: int, words: int, early: int) -> None:
    packed = pack_blocked(quantized(bits, 5, 160, 32), torch.float32, DEVICE)
    assert packed is not None
    x, norm = random(1, 160), random(160) + 3
    config = SMALL | {"words": words, "programs": 2, "rows": 2, "early": early}
    y = int_matvec(x, packed, norm=norm, out=poisoned(1, 5), config=config)
    assert error(y, int_matvec_reference(x, packed, norm=norm)) < 3e-4


@pytest.mark.parametrize(
    ("out", "inputs", "group", "zeros", "perm"),
    [
        (7, 640, 128, "middle", False),  # 80 words are 5 chunks of 16; the second tile lacks a row
        (8, 320, 64, "whole", True),  # 40 words: the last chunk is half there
        (5, 96, 32, "fractions", False),
        (3, 200, 1024, "whole", False),  # a padded row
        (8, 320, 64, "narrow", True),
    ],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_x_is_held_in_chunks(bits: int, out: int, inputs: int, group: int, zeros: str, perm: bool) -> None:
    packed = packed_for(zeros, quantized(bits, out, inputs, group, zeros, perm))
    x, bias, residual, norm = random(1, inputs), random(out), random(1, out, seed=1), random(inputs) + 3
    config = SMALL | {"words": 16, "hold": 1}
    y = int_matvec(x, packed, bias, residual, norm, out=poisoned(1, out), config=config)
    assert error(y, int_matvec_reference(x, packed, bias, residual, norm)) < 3e-4


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_few_kernels_are_compiled_to_choose_from_and_a_card_holds_their_programs(bits: int, model: str) -> None:
    for inputs, out, *_ in SHAPES[model]:
        configs = list(int_configs(bits, inputs, out, 1, cores=132))
        assert 2 <= len(once_each(configs)) <= 42
        for config in configs:
            assert config["warps"] * config["programs"] <= 132 * 16
            held = config["rows"] * config["words"] // (32 * config["warps"])  # words of a thread, and of its next tile
            assert 32 * config["warps"] * (2 * held + 60) * config["programs"] // 132 <= 1.5 * 65536


@pytest.mark.parametrize("early", [0, 1])
@pytest.mark.parametrize("gated", [False, True])
def test_a_held_x_meets_several_tiles(gated: bool, early: int) -> None:
    packed = pack_blocked(quantized(4, 14, 288, 32, "whole"), torch.float32, DEVICE)  # 36 words, 14 rows: 4 tiles
    assert packed is not None
    x, norm = random(2, 288) * 3, random(288) * 0.1 + 1
    config = SMALL | {"words": 16, "programs": 2, "hold": 1, "early": early}
    y = int_matvec(x, packed, norm=norm, gated=gated, out=poisoned(2, 7 if gated else 14), config=config)
    assert error(y, int_matvec_reference(x, packed, norm=norm, gated=gated)) < 3e-4


@pytest.mark.parametrize("hold", [0, 1])
def test_the_output_may_be_the_residual(hold: int) -> None:
    packed = pack_blocked(quantized(4, 6, 256, 128), torch.bfloat16, DEVICE)
    assert packed is not None
    x, residual = random(1, 256, dtype=torch.bfloat16), random(1, 6, dtype=torch.bfloat16)
    wanted = int_matvec_reference(x, packed, None, residual)
    y = int_matvec(x, packed, None, residual, out=residual, config=SMALL | {"words": 16, "rows": 2, "hold": hold})
    assert y is residual and error(y, wanted) < 6e-3  # written over the residual it was added to


@pytest.mark.parametrize(("bits", "rows"), [(4, 3), (8, 2), (4, 16)])
def test_several_rows(bits: int, rows: int) -> None:
    packed = pack_blocked(quantized(bits, 6, 256, 128), torch.bfloat16, DEVICE)
    assert packed is not None
    x = random(rows, 256, dtype=torch.bfloat16)
    y = int_matvec(x, packed, out=poisoned(rows, 6, dtype=torch.bfloat16), config=SMALL | {"rows": 2})
    assert error(y, int_matvec_reference(x, packed)) < 6e-3


@pytest.mark.parametrize("bits", [4, 8])
def test_norm_and_gate_are_part_of_the_product(bits: int) -> None:
    packed = pack_blocked(quantized(bits, 6, 160, 32, "whole"), torch.float32, DEVICE)
    assert packed is not None
    x, norm = random(2, 160) * 3, random(160) * 0.1 + 1
    y = int_matvec(x, packed, norm=norm, eps=1e-6, gated=True, out=poisoned(2, 3), config=SMALL)
    assert error(y, int_matvec_reference(x, packed, norm=norm, eps=1e-6, gated=True)) < 3e-4
