"""Quantized weights: the quantizer against third-party rounding, the form against third-party readers, refusals."""

from dataclasses import replace

import hypothesis.strategies as st
import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch.nn.functional import pad

import llmkernels
from llmkernels import testing
from llmkernels.ops.quantized_gemm_cases import ROUNDING, quantized, settled
from llmkernels.quant import SCHEMES, QuantizedWeight, Scheme, quantize, scheme
from llmkernels.quant.activation import STORED, rounded, scaled
from llmkernels.quant.codes import E2M1, e2m1_codes, e2m1_values, pack, unpack
from llmkernels.shapes import grid

INTEGERS = [name for name in SCHEMES if name.startswith("w")]
TINY = 2.0**-126


def make(dense, name, **options):
    """`dense` quantized, with an act-order and an input scale where the scheme wants them."""
    to = scheme(name)
    if to.act_order:
        order = torch.randperm(dense.shape[1], generator=torch.Generator().manual_seed(5))
        options = {"permutation": order} | options
    if not to.dynamic:
        options = {"input_scale": 0.03} | options
    return quantize(dense, to, **options)


def step(weight):
    """[out, in]: how far it is from each stored number to the next larger one, in the order of x's features."""
    codes = {"int4": (0x00, 0x11), "int8": (0, 1), "fp8": (0, 1), "mxfp4": (0x00, 0x22)}[weight.scheme.weight]
    zero, one = (replace(weight, values=torch.full(weight.values.shape, code).to(weight.dtype)) for code in codes)
    scales = one.dequantize(torch.float64) - zero.dequantize(torch.float64)
    size = (weight.dequantize(torch.float64) / scales).abs()
    if weight.scheme.weight == "mxfp4":
        return scales * torch.where(size >= 4, 2, torch.where(size >= 2, 1, 0.5))
    if weight.scheme.weight == "fp8":
        return scales * torch.exp2(torch.floor(torch.log2(size.clamp(min=2.0**-6))) - 3)
    return scales


@st.composite
def matrices(draw):
    """Small matrices of every size, with rows of zeros and of one sign, outliers, and widths that fill no group."""
    rows, columns = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 31, 32, 33, 64, 100, 129, 200]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dense = rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-30, 30, (rows, 1))
    dense[rng.random((rows, columns)) < 0.02] *= 50
    one_sign = rng.random(rows) < 0.3
    dense[one_sign] = np.abs(dense[one_sign]) * rng.choice([-1, 1])
    dense[rng.random(rows) < 0.2] = 0
    return torch.from_numpy(dense).float()


@pytest.mark.parametrize("name", SCHEMES)
@given(dense=matrices())
@settings(max_examples=25, deadline=None)
def test_no_value_is_off_by_more_than_half_a_step(name, dense):
    weight = make(dense, name)
    error = (weight.dequantize(torch.float64) - dense.double()).abs()
    assert bool((error <= 0.5001 * step(weight) + 448 * TINY).all())


@pytest.mark.parametrize("name", SCHEMES)
@given(dense=matrices())
@settings(max_examples=25, deadline=None)
def test_quantizing_again_changes_nothing(name, dense):
    once = make(dense, name)
    again = make(once.dequantize(), name)
    torch.testing.assert_close(again.dequantize(), once.dequantize(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", INTEGERS)
def test_scales_in_16_bits_cut_nothing_off(name, kind):
    """They are rounded up: no value is off by more than half of the larger step, small rows of float16 included."""
    dense = torch.randn(40, 200, generator=torch.Generator().manual_seed(2)) * torch.logspace(-6, 2, 40)[:, None]
    weight = make(dense, name, scale_dtype=kind)
    assert weight.scales.dtype == kind
    error = (weight.dequantize(torch.float64) - dense.double()).abs()
    assert bool((error <= 0.5001 * step(weight)).all())


@pytest.mark.parametrize("name", INTEGERS)
def test_rounds_as_torch_does(name):
    """torch.fake_quantize_per_channel_affine on each group, with our scales and zero points."""
    dense = torch.randn(6, 256, generator=torch.Generator().manual_seed(3))
    weight = make(dense, name)
    order = slice(None) if weight.permutation is None else weight.permutation.long()
    group = weight.scheme.group or 256
    low, high, middle = (0, 15, 8) if weight.scheme.weight == "int4" else (-128, 127, 0)
    zeros = torch.full_like(weight.scales, middle) if weight.zeros is None else weight.zeros
    theirs = torch.fake_quantize_per_channel_affine(
        dense[:, order].reshape(-1, group), weight.scales.reshape(-1), zeros.reshape(-1).int(), 0, low, high
    )
    assert torch.equal(weight.dequantize()[:, order], theirs.reshape(6, 256))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, and still an oracle
def test_int8_stores_what_torch_stores():
    dense = torch.randn(6, 100, generator=torch.Generator().manual_seed(4))
    weight = quantize(dense, "w8a16")
    zeros = torch.zeros(6, dtype=torch.int64)
    theirs = torch.quantize_per_channel(dense, weight.scales[:, 0].double(), zeros, 0, torch.qint8)
    assert torch.equal(theirs.int_repr(), weight.values)


def test_e2m1_rounds_as_ml_dtypes_does():
    x = torch.cat(
        [torch.linspace(-8, 8, 4097), torch.tensor([0.0, -0.0, 1e-9, 0.25, 0.75, 1.75, 2.5, 3.5, 5.0, 5.001])]
    )
    theirs = x.numpy().astype(ml_dtypes.float4_e2m1fn)
    assert np.array_equal(e2m1_values(e2m1_codes(x), torch.float32).numpy(), theirs.astype(np.float32))
    assert np.array_equal(e2m1_codes(x).numpy().astype(np.uint8) & 15, theirs.view(np.uint8) & 15)
    assert tuple(float(v) for v in np.arange(8, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn)) == E2M1


def test_e4m3_rounds_as_ml_dtypes_does():
    dense = torch.randn(5, 64, generator=torch.Generator().manual_seed(6))
    weight = quantize(dense, "fp8_row")
    theirs = (dense / weight.scales).numpy().astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(weight.values.view(torch.uint8).numpy(), theirs.view(np.uint8))


def test_transformers_reads_our_mxfp4():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    weight = quantize(torch.randn(48, 320, generator=torch.Generator().manual_seed(7)), "mxfp4")
    blocks = weight.values.view(1, 48, 10, 16)
    theirs = convert_moe_packed_tensors(blocks, weight.scales[None], dtype=torch.float32)  # [1, in, out]
    assert torch.equal(theirs[0].T, weight.dequantize())


@pytest.mark.parametrize("name", ["fp8_tensor", "fp8_row", "fp8_block"])
def test_transformers_reads_our_fp8(name):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight = quantize(torch.randn(256, 384, generator=torch.Generator().manual_seed(8)), name)
    theirs = Fp8Dequantize(None).convert({"weight": weight.values, "weight_scale_inv": weight.scales})
    assert torch.equal(theirs["weight"], weight.dequantize())


@given(rows=st.integers(0, 4), columns=st.integers(0, 9), seed=st.integers(0, 2**31))
@settings(deadline=None)
def test_packing_gives_back_what_it_took(rows, columns, seed):
    codes = torch.randint(0, 16, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes)
    assert packed.shape == (rows, -(-columns // 2))
    assert torch.equal(unpack(packed, columns), codes)


def test_the_formula_by_hand():
    """One row, two groups, zero points, act-order: written out."""
    q = torch.arange(64, dtype=torch.uint8)[None] % 16
    order = torch.arange(64, dtype=torch.int32).flip(0)
    zeros, scales = torch.tensor([[3, 15]], dtype=torch.uint8), torch.tensor([[0.5, 2.0]])
    weight = QuantizedWeight(pack(q), scales, zeros, order, "w4a16_g32_zp_actorder")
    for j in range(64):
        assert weight.dequantize()[0, 63 - j] == [0.5, 2.0][j // 32] * (j % 16 - [3, 15][j // 32])
    assert weight.dequantize(torch.bfloat16).dtype == torch.bfloat16
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(9))
    stored = replace(weight, permutation=None, scheme="w4a16_g32_zp").dequantize()
    torch.testing.assert_close(x @ weight.dequantize().T, x[:, order.long()] @ stored.T)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (1, 1), (130, 257)], ids=str)
def test_every_shape(name, shape):
    weight = make(torch.ones(shape), name)
    assert weight.shape == shape
    torch.testing.assert_close(weight.dequantize(), torch.ones(shape), rtol=0.15, atol=0)


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_and_the_smallest_numbers_stay_finite(name):
    dense = torch.zeros(4, 64)
    dense[1], dense[2, 5], dense[3] = 1e-45, -1e-41, 2e38
    weight = make(dense, name)
    if weight.scales.dtype == torch.float32:
        assert bool((weight.scales >= TINY).all())
    assert bool(weight.dequantize().isfinite().all())
    assert bool((weight.dequantize()[0] == 0).all())


def test_every_scheme_has_a_name_of_its_own():
    names = {}
    fields = {
        "weight": ("int4", "int8", "fp8", "mxfp4"),
        "granularity": ("group", "row", "tensor", "block"),
        "group": (0, 32, 64, 128),
        "symmetric": (True, False),
        "act_order": (False, True),
        "activation": (None, "int8", "fp8"),
        "dynamic": (True, False),
    }
    for choice in grid(**fields):
        try:
            to = Scheme(**choice)
        except ValueError:
            continue
        assert scheme(str(to)) == to
        names[str(to)] = to
    assert len(set(names.values())) == len(names)
    assert set(SCHEMES) <= set(names)
    assert all(scheme(to) is to for to in names.values())


def test_signature_says_what_a_kind_depends_on():
    dense = torch.randn(64, 64, generator=torch.Generator().manual_seed(10))
    weight = quantize(dense, "w4a16_g32_zp")
    assert weight.signature == quantize(-dense, "w4a16_g32_zp").signature
    assert weight.signature is quantize(-dense, "w4a16_g32_zp").signature  # interned: compared in no time
    others = [
        quantize(dense, "w4a16_g32"),
        quantize(dense, "w4a16_g64_zp"),
        quantize(dense[:63], "w4a16_g32_zp"),
        quantize(dense[:, :63], "w4a16_g32_zp"),
        quantize(dense, "w4a16_g32_zp", scale_dtype=torch.bfloat16),
        replace(weight, values=weight.values.T.contiguous().T),
        replace(weight, scales=torch.stack([weight.scales, weight.scales], -1)[..., 0]),
        weight.to("meta"),
        make(dense, "w4a16_g32_zp_actorder"),
    ]
    assert len({weight.signature, *(other.signature for other in others)}) == 1 + len(others)


def test_map_to_and_packed():
    weight = make(torch.randn(8, 64), "w4a8_g32_zp_actorder_static")
    weight.packed["cpu"] = "something"
    assert weight.to("cpu") is weight
    moved = weight.to("meta")
    assert moved.packed == {}
    assert {str(moved.device), *(str(p.device) for p in (moved.scales, moved.zeros, moved.permutation))} == {"meta"}
    copy = weight.map(torch.clone)
    assert copy.packed == {}
    assert copy.in_features == 64
    assert torch.equal(copy.dequantize(), weight.dequantize())
    parts = (weight.values, weight.scales, weight.zeros, weight.permutation, weight.input_scale)
    assert weight.nbytes == sum(part.numel() * part.element_size() for part in parts)


def other_way(round_):
    """quantized_gemm as a kernel would write it: a reciprocal, codes summed group by group, scales afterwards."""

    def run(x, weight, *, bias=None):
        to, dtype = weight.scheme, STORED[weight.scheme.activation]
        ones = replace(weight, scales=torch.ones_like(weight.scales)).dequantize()
        group = to.group or max(x.shape[1], 1)
        largest, width = {"int8": 127, "float8_e4m3fn": 448}[dtype], to.activation_group or max(x.shape[1], 1)
        y = torch.zeros(x.shape[0], weight.shape[0])
        for begin in range(0, x.shape[1], group):
            part = slice(begin, begin + group)
            seen = x[:, part] if width < x.shape[1] else x
            peak = (
                seen.float().abs().amax(1, keepdim=True) if weight.input_scale is None else weight.input_scale * largest
            )
            factor = torch.where(peak > TINY * largest, largest / peak, 1)
            codes = round_((x[:, part].float() * factor).clamp(-largest, largest), dtype)
            of = (slice(None), begin // group)
            scales = weight.scales[of] if to.granularity != "block" else weight.scales[of].repeat_interleave(128)
            y += (codes @ ones[:, part].T) * scales[: weight.shape[0]] / factor
        return (y if bias is None else y + bias.float()).to(x.dtype)

    return run


def rounded_down(ratio, dtype):
    return ratio.floor() if dtype == "int8" else rounded(ratio * (1 - 2.0**-5), dtype)


@pytest.mark.parametrize("name", ROUNDING)
def test_rounded_activations_leave_a_kernel_its_freedom_and_no_more(name):
    """The inputs have no near-ties: a reciprocal passes, another rounding does not."""
    module = type("kernel", (), {"TRAITS": {}})
    ((contract, dtype, case),) = testing.calls("quantized_gemm", "float32", f"{name}, 5 x 48 x 320")
    for round_, verdict in ((rounded, "passed"), (rounded_down, "failed")):
        module.run = staticmethod(other_way(round_))
        assert testing.check_run(contract, dtype, case, module, "kernel").verdict == verdict


@pytest.mark.parametrize("name", ROUNDING)
def test_settled_inputs_round_alike_in_float32_and_float64(name):
    rng = np.random.default_rng(16)
    weight = quantized(rng, name, 16, 512)
    x = torch.from_numpy(settled(rng, rng.standard_normal((64, 512)), weight))
    dtype, group = STORED[weight.scheme.activation], weight.scheme.activation_group
    exact, _ = scaled(x, dtype, group, weight.input_scale)
    for kind in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(x.to(kind).double(), x)
    near, _ = scaled(x.float(), dtype, group, weight.input_scale)
    assert torch.equal(rounded(exact, dtype).float(), rounded(near, dtype))


@given(
    hidden=st.integers(1, 70), group=st.sampled_from([0, 1, 32]), seed=st.integers(0, 2**31), power=st.integers(-20, 20)
)
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_activations_come_back_within_half_a_step(dtype, hidden, group, seed, power):
    x = torch.randn(3, hidden, generator=torch.Generator().manual_seed(seed)) * 10.0**power
    values, scales = llmkernels.quantize_activation(x, dtype=dtype, group=group, backend="reference")
    width = group or hidden
    spread = scales.repeat_interleave(width, -1)[:, :hidden]
    error = (values.float() * spread - x).abs()
    half = 0.5 if dtype == "int8" else torch.maximum(values.float().abs() / 16, torch.tensor(2.0**-10))
    assert bool((error <= spread * half * (1 + 1e-5) + 1e-5 * spread).all())
    peak = pad(x, (0, -hidden % width)).unflatten(1, (-1, width)).abs().amax(-1)
    torch.testing.assert_close(scales * (127 if dtype == "int8" else 448), peak)
