"""Products with plain and packed weights equal the dequantised reference, whatever path the machine takes."""

import pytest
import torch

from qwenfit.kernels import choice, native
from qwenfit.kernels.linear import (
    choose_kernel,
    dequantize,
    linear,
    linear_reference,
    pack,
    quantized_linear,
    quantized_linear_reference,
)
from qwenfit.quantize.rtn import quantize_rtn
from qwenfit.quantize.types import QuantizedWeight

SHAPES = [(64, 256), (1, 32), (17, 40), (130, 896), (96, 100), (31, 33), (256, 1408)]  # [out, in]
# Largest difference relative to the largest output: float32 sums in another order; a unit in the last of 8 or 11 bits.
TOLERANCE = {torch.float32: 8e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@pytest.fixture(params=["native", "native without tiles", "torch"], autouse=True)
def kernels(request, monkeypatch):
    """Every test runs with the C kernels, as on a CPU without AMX where this one has it, and without a compiler."""
    if request.param != "torch" and not native.available():
        pytest.skip(native.why_not())
    if request.param == "native without tiles":
        if not native.tiles():
            pytest.skip("there is no AMX here: the same as native")
        monkeypatch.setattr(native, "tiles", lambda: False)
    if request.param == "torch":
        monkeypatch.setattr(native, "_load", lambda name: "no C compiler was found")
        monkeypatch.setattr(native, "tiles", lambda: False)
    choose_kernel.cache_clear()
    with torch.no_grad():
        yield request.param
    choose_kernel.cache_clear()


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """Memory that a kernel should have written is NaN, not a lucky zero."""
    empty = torch.empty

    def poisoned(*size, **options):
        result = empty(*size, **options)
        return result.fill_(float("nan")) if result.is_floating_point() else result

    monkeypatch.setattr(torch, "empty", poisoned)


def assert_close(result, reference, dtype, extra=0.0):
    assert result.dtype == dtype and result.shape == reference.shape
    error = (result.double() - reference.double()).abs().max() / reference.double().abs().max()
    assert error <= TOLERANCE[dtype] + extra, f"{error:.2e}"


def quantized(out_features, in_features, bits, group_size, sym=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return quantize_rtn(torch.randn(out_features, in_features, generator=generator), bits, group_size, sym)


def int4pack_extra(packed):
    """torch's int4 kernel keeps scales in bf16 and takes bf16 activations."""
    return 1e-2 if packed.layout == "int4pack" else 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 13, 29])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_plain_product_is_the_reference(shape, rows, dtype):
    torch.manual_seed(1)
    weight, bias = torch.randn(shape).to(dtype), torch.randn(shape[0]).to(dtype)
    x = torch.randn(rows, shape[1]).to(dtype)
    for b in (None, bias):
        assert_close(linear(x, weight, b), linear_reference(x, weight, b), dtype)


@pytest.mark.parametrize("rows", [1, 4, 9])
def test_float32_activations_meet_bf16_weights_exactly(rows):
    torch.manual_seed(2)
    x, weight = torch.randn(rows, 896), torch.randn(130, 896).bfloat16()
    assert_close(linear(x, weight), linear_reference(x, weight), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 13, 29])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_packed_product_is_the_reference(bits, group_size, rows, dtype):
    torch.manual_seed(3)
    for out_features, in_features in SHAPES:
        for sym in (True, False):
            qw = quantized(out_features, in_features, bits, group_size, sym)
            packed = pack(qw, dtype)
            x, bias = torch.randn(rows, in_features).to(dtype), torch.randn(out_features).to(dtype)
            for b in (None, bias):
                reference = quantized_linear_reference(x, qw, b)
                assert_close(quantized_linear(x, packed, b), reference, dtype, int4pack_extra(packed))


@pytest.mark.parametrize("bits", [4, 8])
def test_act_order_permutes_the_inputs(bits):
    qw = quantized(48, 256, bits, 64)
    qw.perm = torch.randperm(256, generator=torch.Generator().manual_seed(4))
    x = torch.randn(3, 256)
    packed = pack(qw, torch.float32)
    assert_close(quantized_linear(x, packed), x @ qw.dequantize().T, torch.float32)
    torch.testing.assert_close(dequantize(packed), qw.dequantize(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_keeps_every_code(shape, bits):
    """All codes occur, zeros are not integers, and float32 unpacking gives what they say."""
    generator = torch.Generator().manual_seed(5)
    q = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    groups = -(-shape[1] // 32)
    scales, zeros = torch.rand(shape[0], groups, generator=generator), torch.rand(shape[0], groups) * 2**bits
    qw = QuantizedWeight(bits, 32, q, scales, zeros)
    torch.testing.assert_close(dequantize(pack(qw, torch.float32)), qw.dequantize(), rtol=1e-6, atol=1e-6)


def test_a_group_no_kernel_takes_is_unpacked_row_by_row():
    qw = quantized(20, 50, 4, 10)
    packed = pack(qw, torch.float32)
    assert packed.layout == "rows"
    x = torch.randn(2, 50)
    assert_close(quantized_linear(x, packed), quantized_linear_reference(x, qw), torch.float32)


def test_leading_dimensions_and_strides_do_not_matter():
    qw = quantized(48, 64, 4, 32)
    x = torch.randn(64, 2, 5).permute(1, 2, 0)  # [2, 5, 64], not contiguous
    result = quantized_linear(x, pack(qw, torch.float32))
    assert_close(result, quantized_linear_reference(x, qw), torch.float32)
    assert linear(x[:, :0], torch.randn(48, 64)).shape == (2, 0, 48)
    assert quantized_linear(x[:, :0], pack(qw, torch.float32)).shape == (2, 0, 48)


def test_nan_and_infinity_pass_through():
    """A broken activation must show in the logits, so that the engine can end that request."""
    qw, weight = quantized(48, 64, 4, 32), torch.randn(48, 64).bfloat16()
    for bad in (float("nan"), float("inf")):
        x = torch.ones(1, 64, dtype=torch.bfloat16)
        x[0, 7] = bad
        assert not quantized_linear(x, pack(qw, torch.bfloat16)).isfinite().any()
        assert not linear(x, weight).isfinite().any()


def test_nbytes_is_codes_and_scales(kernels):
    packed = pack(quantized(1024, 1024, 4, 128), torch.bfloat16)
    assert packed.nbytes == 1024 * 1024 // 2 + 1024 * 8 * 4  # float32 scale, or bf16 scale and offset


def test_without_a_compiler_the_reason_names_it(kernels):
    reason = choose_kernel("int4", torch.bfloat16, 1, "cpu").reason
    assert ("no C compiler" in reason) == (kernels == "torch")


def test_gradients_flow_through_a_plain_product():
    x, weight = torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True), torch.randn(4, 8, dtype=torch.bfloat16)
    with torch.enable_grad():
        linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(2, 8), rtol=2e-2, atol=2e-2)


def test_bf16_cpus_unpack_prompts_for_onednn(monkeypatch, kernels):
    """The path of CPUs with bf16 instructions, taken here whatever this CPU has."""
    if kernels == "torch":
        pytest.skip("needs the C kernels to unpack")
    monkeypatch.setattr(choice, "onednn_bf16", lambda: True)
    monkeypatch.setattr(native, "tiles", lambda: False)
    choose_kernel.cache_clear()
    assert choose_kernel("int4", torch.bfloat16, 64, "cpu").name == "unpack"
    qw = quantized(70, 256, 4, 128)
    x = torch.randn(64, 256).bfloat16()
    result = quantized_linear(x, pack(qw, torch.bfloat16))
    assert_close(result, quantized_linear_reference(x, qw), torch.bfloat16, extra=5e-3)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [5, 16, 33, 160, 530])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_tiles_multiply_any_number_of_rows_and_outputs(kernels, bits, rows, threads):
    """One tile of rows and less, two and a rest, and more than a panel is kept for; outputs of one block and of many,
    inputs of one panel and of more, whole tiles or not. oneDNN, which uses the same registers, has its turn between."""
    if kernels != "native" or not native.tiles():
        pytest.skip("there is no AMX here")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for out_features, in_features in ((16, 128), (50, 300), (200, 640), (1000, 1100)):
            x, bias = torch.randn(rows, in_features).bfloat16(), torch.randn(out_features).bfloat16()
            if bits == 16:
                weight = torch.randn(out_features, in_features).bfloat16()
                result = linear(x, weight, bias)
                assert choose_kernel("bf16", x.dtype, rows, "cpu").name == "native tiles"
            else:
                qw = quantized(out_features, in_features, bits, 128 if in_features % 128 == 0 else in_features)
                weight = qw.dequantize(torch.float32).bfloat16()
                result = quantized_linear(x, pack(qw, torch.bfloat16), bias)
            assert_close(result, linear_reference(x, weight, bias), torch.bfloat16)
            narrow = torch.nn.functional.linear(x, weight, bias)
            assert_close(narrow, linear_reference(x, weight, bias), torch.bfloat16)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bits", [4, 8])
def test_one_huge_activation_does_not_drown_the_others(bits):
    """Activations of thousands beside ones of a tenth, as Qwen's first token has them: still one bf16 rounding."""
    qw = quantized(64, 512, bits, 128)
    x = torch.randn(2, 512).mul(0.1).bfloat16()
    x[:, 130] = 6000.0
    assert_close(quantized_linear(x, pack(qw, torch.bfloat16)), quantized_linear_reference(x, qw), torch.bfloat16, 1e-2)
    tiny = torch.full((1, 512), 1e-38, dtype=torch.bfloat16)
    assert quantized_linear(tiny, pack(qw, torch.bfloat16)).abs().max() < 1e-30
