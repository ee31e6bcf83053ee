"""What quantized weights, their quantizer and their schemes refuse, and that one line says why."""

import re
from dataclasses import replace

import pytest
import torch

import llmkernels
from llmkernels.quant import Scheme, quantize


def dense(seed):
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(seed))


W4 = quantize(dense(11), "w4a16_g32_zp")
STATIC = quantize(dense(12), "w8a8_static", input_scale=0.1)
ORDER = quantize(dense(13), "w4a16_g32_actorder", permutation=range(63, -1, -1))
FP8 = quantize(dense(14), "fp8_block")
MX = quantize(dense(15), "mxfp4")


@pytest.mark.parametrize(
    ("weight", "change", "words"),
    [
        (W4, {"scheme": "w4a16_g99"}, "group is 99; int4 weights with a scale a group take 32 or 64 or 128"),
        (W4, {"scheme": "q4_k"}, "scheme 'q4_k' is unknown; use a name such as w4a16, w4a16_zp"),
        (W4, {"scheme": "w4a16_g64_zp"}, "scales has shape (6, 2); the scheme w4a16_g64_zp of 6 x 64 wants [6, 1]"),
        (W4, {"scheme": "w4a16_g32"}, "zeros is given, but the scheme w4a16_g32 has none; leave it out"),
        (W4, {"zeros": None}, "zeros is missing; the scheme w4a16_g32_zp needs it: uint8 [6, 2]"),
        (W4, {"values": W4.values[0]}, "values has shape (32,); the scheme w4a16_g32_zp wants [out, columns]"),
        (W4, {"values": W4.values.int()}, "values is int32; the scheme w4a16_g32_zp wants uint8"),
        (W4, {"values": [1, 2]}, "values is [1, 2], of type list; pass an array"),
        (W4, {"scales": W4.scales.double()}, "scales is float64; the scheme w4a16_g32_zp wants float32 or bfloat16"),
        (W4, {"scales": W4.scales.T}, "scales has shape (2, 6); the scheme w4a16_g32_zp of 6 x 64 wants [6, 2]"),
        (W4, {"in_features": 65}, "in_features is 65, but values has shape (6, 32); int4 stores 65 columns in 33"),
        (W4, {"scales": W4.scales.to("meta")}, "values is on cpu but scales is on meta; put them on one"),
        (W4, {"scales": W4.scales.numpy()}, "values is a torch array but scales is a numpy array"),
        (W4, {"scales": W4.scales.to_sparse()}, "scales is a tensor of layout sparse_coo; pass a dense one"),
        (W4, {"in_features": 64.0}, "in_features is 64.0; give the columns of the dense weight"),
        (W4, {"input_scale": torch.ones(1)}, "input_scale is given, but the scheme w4a16_g32_zp has none"),
        (STATIC, {"input_scale": None}, "input_scale is missing; the scheme w8a8_static needs it: float32 [1]"),
        (STATIC, {"input_scale": torch.ones(2)}, "input_scale has shape (2,); the scheme w8a8_static"),
        (ORDER, {"permutation": None}, "permutation is missing; the scheme w4a16_g32_actorder needs it: int32 [64]"),
        (ORDER, {"permutation": ORDER.permutation.long()}, "permutation is int64; the scheme w4a16_g32"),
        (FP8, {"scales": FP8.scales.bfloat16()}, "scales is bfloat16; the scheme fp8_block wants float32"),
        (FP8, {"scheme": "fp8_row"}, "scales has shape (1, 1); the scheme fp8_row of 6 x 64 wants [6, 1]"),
        (MX, {"scales": MX.scales.float()}, "scales is float32; the scheme mxfp4 wants uint8"),
    ],
)  # fmt: skip
def test_a_part_that_does_not_fit_is_named(weight, change, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        replace(weight, **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("weight", "part", "index", "value", "words"),
    [
        (W4, "scales", (2, 1), float("nan"), "scales[2, 1] is nan; scales are finite numbers"),
        (FP8, "scales", (0, 0), float("inf"), "scales[0, 0] is inf"),
        (MX, "scales", (5, 1), 255, "scales[5, 1] is 255, an e8m0 NaN"),
        (W4, "zeros", (3, 0), 16, "zeros[3, 0] is 16; 4-bit zero points are 0 to 15: unpack them"),
        (STATIC, "input_scale", 0, 0.0, "input_scale is 0.0; it is a finite number above 0"),
        (STATIC, "input_scale", 0, float("nan"), "input_scale is nan"),
        (ORDER, "permutation", 3, 64, "permutation[3] is 64; features of x are 0 to 63"),
        (ORDER, "permutation", 3, -1, "permutation[3] is -1"),
        (ORDER, "permutation", slice(0, 2), 7, "permutation leaves out feature"),
    ],
)
def test_a_value_that_cannot_be_meant_is_named(weight, part, index, value, words):
    changed = getattr(weight, part).clone()
    changed[index] = value
    broken = replace(weight, **{part: changed})
    x = torch.zeros(1, 64)
    for refuse in (broken.check_values, lambda: llmkernels.quantized_gemm(x, broken, backend="reference")):
        with pytest.raises(ValueError, match=re.escape(words)) as error:
            refuse()
        assert "\n" not in str(error.value)
    weight.check_values()


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((torch.ones(3), "w8a16"), {}, "weight is float32 (3,); pass a float matrix [out, in]"),
        ((torch.ones(3, 4).int(), "w8a16"), {}, "weight is int32 (3, 4)"),
        (([[1.0]], "w8a16"), {}, "weight is [[1.0]]; pass a float matrix"),
        ((torch.full((2, 2), float("nan")), "w8a16"), {}, "weight[0, 0] is nan; weights are finite"),
        ((torch.tensor([[1.0, float("-inf")]]), "mxfp4"), {}, "weight[0, 1] is -inf"),
        ((torch.tensor([[1e300]], dtype=torch.float64), "fp8_row"), {}, "weight[0, 0] is 1e+300"),
        ((torch.ones(2, 4), "w3a16"), {}, "scheme 'w3a16' is unknown"),
        ((torch.ones(2, 4), None), {}, "scheme None is unknown"),
        ((torch.ones(2, 4), "w8a8_static"), {}, "input_scale is missing; the scheme w8a8_static needs it"),
        ((torch.ones(2, 4), "w8a8_static"), {"input_scale": 0.0}, "input_scale is 0.0; it is a finite number above 0"),
        ((torch.ones(2, 4), "w8a8_static"), {"input_scale": [1.0, 2.0]}, "input_scale has shape (2,); give one number"),
        ((torch.ones(2, 4), "w8a8"), {"input_scale": 1.0}, "input_scale is given, but the scheme w8a8 has none"),
        ((torch.ones(2, 4), "w4a16_actorder"), {}, "permutation is missing; the scheme w4a16_actorder needs it"),
        ((torch.ones(2, 4), "w4a16"), {"permutation": range(4)}, "permutation is given, but the scheme w4a16 has none"),
        ((torch.ones(2, 3), "w4a16_actorder"), {"permutation": [0, 1, 1]}, "is [0, 1, 1]; name each of 0 to 2 once"),
        ((torch.ones(2, 4), "w4a16"), {"scale_dtype": torch.float64}, "scale_dtype is torch.float64; use"),
        ((torch.full((2, 4), 1e7), "w4a16"), {"scale_dtype": torch.float16}, "a scale is 1.43e+06, too large"),
    ],
)  # fmt: skip
def test_what_the_quantizer_refuses(arguments, options, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        quantize(*arguments, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weight": "int3"}, "weight is 'int3'; use one of int4, int8, fp8, mxfp4"),
        ({"weight": "int4", "granularity": "block"}, "granularity is 'block'; int4 weights take group or row"),
        ({"weight": "int8", "granularity": "group", "group": 48}, "group is 48; int8 weights with a scale a group"),
        ({"weight": "fp8", "granularity": "row", "group": 128}, "group is 128; fp8 weights with a scale a row take 0"),
        ({"weight": "int8", "activation": "fp8"}, "activation is 'fp8'; int8 weights take 'int8' or None"),
        ({"weight": "mxfp4", "granularity": "group", "group": 32, "activation": "fp8"}, "mxfp4 weights take None"),
        ({"weight": "fp8", "symmetric": False}, "fp8 weights have no zero points and no act-order"),
        ({"weight": "int8", "dynamic": False}, "dynamic is False, but activation is None"),
        ({"weight": "fp8", "granularity": "block", "group": 128, "activation": "fp8", "dynamic": False}, "block"),
    ],
)  # fmt: skip
def test_schemes_that_are_none(fields, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Scheme(**fields)
