"""The CPU's products beyond the conformance cases: invariance, threads, packing, sizes that its tiles do not divide."""

import pytest
import torch
import torch.nn.functional as F
from llmkernels.backends import cpu

from llmkernels.quant import SCHEMES, quantize

if why := cpu.absent():
    pytest.skip(f"the cpu backend is absent: {why}", allow_module_level=True)

from llmkernels.backends.cpu import lora_gemm, norm_linear_activation, quantized_gemm

PLAIN = {"norm_weight": None, "norm_bias": None, "residual": None, "bias": None, "eps": 1e-6, "return_residual": False}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weight(name, features=200, columns=328, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(features, columns, generator=generator) / columns**0.5
    order = torch.randperm(columns, generator=generator) if "actorder" in name else None
    scale = torch.tensor([0.03]) if "static" in name else None
    return quantize(dense, name, permutation=order, input_scale=scale)


def tolerance(dtype):
    """What float32 sums and one rounding at the end may cost, relative to the largest value."""
    return 8 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps / 2


@pytest.fixture
def threads():
    """A function that sets how many threads torch, and so the kernels, may use."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_row_of_quantized_gemm_depends_on_that_row_alone(name, dtype):
    w = weight(name)
    x = torch.randn(64, 328, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = quantized_gemm.run(x, w, bias=None)
    for rows in (1, 2, 7):
        assert torch.equal(quantized_gemm.run(x[:rows], w, bias=None), whole[:rows])
    assert torch.equal(quantized_gemm.run(x[63:], w, bias=None), whole[63:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_of_few_rows_of_a_dense_weight_depends_on_that_row_alone(dtype):
    """Four rows are summed across lanes together, and those that are left one by one."""
    x, dense = torch.randn(64, 328).to(dtype), torch.randn(200, 328).to(dtype)
    whole = norm_linear_activation.run(x, dense, norm="none", activation="none", **PLAIN)
    for rows in (1, 2, 3, 7, 21):
        part = norm_linear_activation.run(x[:rows], dense, norm="none", activation="none", **PLAIN)
        assert torch.equal(part, whole[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_lora_gemm_depends_on_that_row_alone(dtype):
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(64, 96, generator=generator).to(dtype), torch.randn(64, 80, generator=generator).to(dtype)
    a, b = torch.randn(3, 12, 96, generator=generator).to(dtype), torch.randn(3, 80, 12, generator=generator).to(dtype)
    adapters = torch.randint(-1, 3, (64,), generator=generator, dtype=torch.int32)
    scales = torch.tensor([0.5, 1.0, 2.0])
    whole = y.clone()
    lora_gemm.run(whole, x, a, b, adapters, scales)
    for rows in (1, 2, 7):
        part = y[:rows].clone()
        lora_gemm.run(part, x[:rows], a, b, adapters[:rows], scales)
        assert torch.equal(part, whole[:rows])


@pytest.mark.parametrize("name", ["w4a16_g128_zp", "w8a8", "fp8_block"])
@pytest.mark.parametrize("rows", [3, 300])
def test_threads_do_not_change_the_result(name, rows, threads):
    w, x = weight(name, 700, 520), torch.randn(rows, 520).bfloat16()
    threads(1)
    one = quantized_gemm.run(x, w, bias=None)
    threads(3)
    assert torch.equal(quantized_gemm.run(x, w, bias=None), one)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [15, 16, 17, 32, 33, 64, 65, 255, 256, 257, 511, 513])
def test_rows_around_the_sizes_of_blocks(rows, dtype):
    """Blocks of 256 rows, 512 prepared at a time, panels that are decoded above 32 rows, other products above 64."""
    x = torch.randn(rows, 72).to(dtype)
    dense = torch.randn(70, 72).to(dtype) / 8
    got = norm_linear_activation.run(x, dense, norm="none", activation="none", **PLAIN)
    want = x.double() @ dense.double().T
    assert (got.double() - want).abs().max() < tolerance(dtype) * want.abs().max()
    quantized = weight("w4a16_g32", 70, 72)
    got = quantized_gemm.run(x, quantized, bias=None)
    want = x.double() @ quantized.dequantize(torch.float64).T
    assert (got.double() - want).abs().max() < tolerance(dtype) * want.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [65, 300])
@pytest.mark.parametrize(
    ("norm", "activation", "act"),
    [
        ("rms", "silu", F.silu),
        ("layer", "gelu", F.gelu),
        ("rms", "swiglu", lambda z: F.silu(z[:, :33]) * z[:, 33:]),
        ("none", "gelu_tanh", lambda z: F.gelu(z, approximate="tanh")),
    ],
)
def test_many_rows_of_a_dense_weight(norm, activation, act, rows, dtype):
    x, residual = torch.randn(2, rows, 72).to(dtype)
    gain, bias, dense = torch.rand(72).to(dtype) + 0.5, torch.randn(66).to(dtype), torch.randn(66, 72).to(dtype) / 8
    gain = None if norm == "none" else gain
    options = PLAIN | {"norm_weight": gain, "residual": residual, "bias": bias, "return_residual": True}
    y, kept = norm_linear_activation.run(x, dense, norm=norm, activation=activation, **options)
    assert torch.equal(kept, (x.double() + residual.double()).to(dtype))
    n = x.double() + residual.double()
    n = n - n.mean(1, keepdim=True) if norm == "layer" else n
    n = n if norm == "none" else n / (n.square().mean(1, keepdim=True) + 1e-6).sqrt() * gain.double()
    want = act(n @ dense.double().T + bias.double())
    assert (y.double() - want).abs().max() < 3 * tolerance(dtype) * want.abs().max()


def test_a_weight_is_packed_once_for_each_use():
    w = weight("w4a16_g128", 128, 256)
    x = torch.randn(2, 256)
    quantized_gemm.run(x, w, bias=None)
    forms = w.packed["cpu"]
    plain = forms[False]
    quantized_gemm.run(x, w, bias=None)
    assert forms[False] is plain
    norm_linear_activation.run(x, w, norm="rms", activation="swiglu", **PLAIN)
    assert set(forms) == {False, True}


def test_a_nan_among_fp8_codes_makes_its_output_nan():
    w = weight("fp8_row_a16", 5, 40)
    w.values.view(torch.uint8)[3, 7] = 0x7F
    y = quantized_gemm.run(torch.ones(2, 40), w, bias=None)
    assert y.isnan().tolist() == [[False, False, False, True, False]] * 2


def test_small_numbers_keep_their_bits():
    """Codes that are multiplied in place are up to 4096 times too large, and x is as much smaller."""
    w = weight("w4a16_g32", 64, 64)
    x = (torch.randn(3, 64) * 1e-30).bfloat16()
    want = x.double() @ w.dequantize(torch.float64).T
    got = quantized_gemm.run(x, w, bias=None).double()
    assert (got - want).abs().max() < 2**-8 * want.abs().max()
