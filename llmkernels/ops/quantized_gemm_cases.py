"""The calls of quantized_gemm worth making, and how quantized weights and their activations are drawn.

Where a scheme rounds x, a value near the middle of two levels may go either way, and a whole level is far more than the
tolerance.  So x is drawn from numbers that every dtype of T holds exactly, and those near a middle are drawn again;
true ties come in cases of their own, where the scale is a power of two and every way of computing them agrees.
"""

import math
from dataclasses import replace

import numpy as np
import torch

from llmkernels.contract import Case, View
from llmkernels.quant import SCHEMES, QuantizedWeight, quantize, scheme
from llmkernels.quant.activation import LARGEST, STORED, rounded, scaled

INPUT_SCALE = 0.03


def inputs(
    rng,
    scheme,
    rows=5,
    out=48,
    in_=320,
    bias=False,
    weight=None,
    x_special=None,
    layout="rows",
    break_it=None,
    **options,
):
    rows = rows if isinstance(rows, tuple) else (rows,)
    given = quantized(rng, scheme, out, in_, weight, **options)
    x = rng.standard_normal((*rows, in_))
    if x_special:
        x = X_SPECIALS[x_special](x, given)
    elif given.scheme.activation:
        x = settled(rng, x, given)
    arrays = {"x": x, "weight": given, "bias": rng.standard_normal(out) if bias else None}
    if break_it:
        BREAKS[break_it](arrays)
    return LAYOUTS[layout](arrays, in_)


def quantized(rng, name, out, in_, special=None, scale_dtype=torch.float32, input_scale=INPUT_SCALE) -> QuantizedWeight:
    """A weight of the scheme `name`, its values of a size that keeps a row of the product near 1."""
    to = scheme(name)
    dense = rng.standard_normal((out, in_)) / math.sqrt(max(in_, 1))
    if special in DENSE:
        DENSE[special](dense)
    weight = quantize(
        torch.from_numpy(dense).float(),
        to,
        permutation=rng.permutation(in_) if to.act_order else None,
        input_scale=None if to.dynamic else input_scale,
        scale_dtype=scale_dtype,
    )
    return STORED_SPECIALS[special](rng, weight) if special in STORED_SPECIALS else weight


def settled(rng, x, weight, transform=lambda x: x):
    """x with every value drawn again that, after `transform`, lies near the middle of two levels of its rounding."""
    x = coarse(x)
    dtype = STORED[weight.scheme.activation]
    for _ in range(100):
        seen, group = torch.from_numpy(transform(x)), weight.scheme.activation_group
        ratio, _scales = scaled(seen, dtype, group, weight.input_scale)
        slack = 1e-5 * ratio.abs() + 1e-6 * LARGEST[dtype]
        near = (rounded(ratio - slack, dtype) != rounded(ratio + slack, dtype)) & (ratio.abs() < LARGEST[dtype])
        if not near.any():
            return x
        x[near.numpy()] = coarse(rng.standard_normal(int(near.sum())))
    raise RuntimeError("settled: some value stays near a middle; draw other inputs for this case")


def coarse(x):
    """x rounded to 8 significant bits, and to 0 below 2 ** -10: exact in float32, bfloat16 and float16 alike."""
    fraction, exponent = np.frexp(x)
    return np.where(np.abs(x) < 2.0**-10, 0, np.ldexp(np.rint(fraction * 256) / 256, exponent))


def _zero_points_at_both_ends(dense):
    """Rows of one sign: the zero point is 0 where all are positive, and the largest level where all are negative."""
    dense[:] = np.abs(dense)
    dense[1::2] *= -1


def _zero_groups(dense):
    """The first 128 rows and columns, and one row: a whole FP8 block, and whole groups of every size."""
    dense[:128, :128] = 0
    dense[-1] = 0


def _tiny(dense):
    """Rows down to the smallest numbers of float32, where a scale is stored as 1 and the values as 0."""
    dense[0] *= 1e-20
    dense[1] *= 1e-37
    dense[2] *= 1e-42


def _outliers(dense):
    dense[::7, ::50] *= 100


DENSE = {
    "zero points 0 and 15": _zero_points_at_both_ends,
    "zero groups": _zero_groups,
    "tiny": _tiny,
    "outliers": _outliers,
}


def _every_code(rng, weight):
    """Every byte that the format allows, zero points anywhere, scales that differ by a factor of ten."""
    bytes_ = torch.from_numpy(rng.integers(0, 256, tuple(weight.values.shape), np.uint8))
    if weight.scheme.weight == "fp8":
        bytes_[(bytes_ & 127) == 127] = 0  # NaN
        levels = 448
    else:
        levels = {"int4": 8, "int8": 128, "mxfp4": 6}[weight.scheme.weight]
    if weight.scheme.weight == "int4" and weight.in_features % 2:
        bytes_[:, -1] &= 15
    factor = torch.from_numpy(rng.uniform(0.3, 3, tuple(weight.scales.shape))) / levels / math.sqrt(weight.in_features)
    if weight.scheme.weight == "mxfp4":
        scales = (127 + torch.log2(factor).round()).to(torch.uint8)
    else:
        scales = factor.to(weight.scales.dtype)
    zeros = weight.zeros
    if zeros is not None:
        low, high = (0, 16) if weight.scheme.weight == "int4" else (-128, 128)
        zeros = torch.from_numpy(rng.integers(low, high, tuple(zeros.shape))).to(zeros.dtype)
    return replace(weight, values=bytes_.view(weight.values.dtype), scales=scales, zeros=zeros)


def _scaled_by(factor):
    """Every second scale times `factor`."""

    def change(rng, weight):
        scales = weight.scales.clone()
        scales.view(-1)[::2] *= factor
        return replace(weight, scales=scales)

    return change


STORED_SPECIALS = {
    "every code": _every_code,
    "zero scales": _scaled_by(0.0),
    "negative scales": _scaled_by(-1.0),
    "subnormal scales": _scaled_by(1e-38),
}


def _not_finite(value):
    def change(x, weight):
        x = coarse(x) if weight.scheme.activation is None else settled(np.random.default_rng(0), x, weight)
        x[1, 3] = value
        return x

    return change


def _ties(x, weight):
    """Every row reaches the largest level, so that the scale is 1; half of the values lie between two levels."""
    dtype = STORED[weight.scheme.activation]
    scale = 1.0 if weight.input_scale is None else float(weight.input_scale)
    x = np.round(40 * x.clip(-3, 3)) / 2 if dtype == "int8" else np.round(10 * x.clip(-3, 3))
    x[:, ::64] = LARGEST[dtype]
    return scale * x


def _zero_rows(x, weight):
    x = settled(np.random.default_rng(0), x, weight)
    x[::2] = 0
    return x


def _beyond(x, weight):
    """Values far beyond what a calibrated scale covers."""
    x = settled(np.random.default_rng(0), x, weight)
    x[:, ::3] = 1000
    x[:, 1::3] = -1000
    return x


X_SPECIALS = {
    "NaN": _not_finite(np.nan),
    "infinity": _not_finite(np.inf),
    "ties": _ties,
    "zero rows": _zero_rows,
    "beyond the scale": _beyond,
}


def _gaps(arrays, in_):
    """The left part of wider rows."""
    wider = np.concatenate([arrays["x"], np.full_like(arrays["x"], np.nan)], -1)
    return arrays | {"_wide": wider, "x": View("_wide", (..., slice(0, in_)))}


def _columns(arrays, in_):
    return arrays | {"_columns": arrays["x"].T, "x": View("_columns", axes=(1, 0))}


def _every_other(arrays, in_):
    """Rows two apart in memory."""
    return arrays | {"_double": np.repeat(arrays["x"], 2, 0), "x": View("_double", (slice(None, None, 2),))}


LAYOUTS = {"rows": lambda arrays, in_: arrays, "gaps": _gaps, "columns": _columns, "every other row": _every_other}


def _set(part, index, value):
    def change(arrays):
        changed = getattr(arrays["weight"], part).clone()
        changed[index] = value
        arrays["weight"] = replace(arrays["weight"], **{part: changed})

    return change


def _short_bias(arrays):
    arrays["bias"] = arrays["bias"][:-1]


def _narrow_x(arrays):
    arrays["x"] = arrays["x"][..., :-1]


BREAKS = {
    "NaN scale": _set("scales", (3, 1), math.nan),
    "infinite scale": _set("scales", (0, 0), math.inf),
    "e8m0 NaN": _set("scales", (3, 1), 255),
    "zero point 16": _set("zeros", (2, 1), 16),
    "feature named twice": _set("permutation", 0, 5),
    "feature out of range": _set("permutation", 7, 320),
    "input_scale 0": _set("input_scale", 0, 0),
    "input_scale NaN": _set("input_scale", 0, math.nan),
    "bias too short": _short_bias,
    "x too narrow": _narrow_x,
}


def _case(name, to, hostile=False, raises=None, **args):
    return Case(f"{to}, {name}", {"scheme": to, **args}, hostile, raises)


def _each(name, schemes, hostile=False, **args):
    return [_case(name, to, hostile, **args) for to in schemes]


def _broken(to, name, raises, **args):
    return _case(name, to, True, raises, break_it=name, **args)


STATIC = ("w8a8_static", "fp8_tensor_static")
ROUNDING = ("w8a8", "w4a8_g128", "fp8_tensor", "fp8_row", "fp8_block", *STATIC)  # x is rounded
TYPICAL = ("w4a16_g128", "w4a16_g128_zp", "w4a16_g128_actorder", "w8a16", "w8a8", "fp8_row", "fp8_block", "mxfp4")

CASES = [
    *(_case("5 x 48 x 320", name, bias=i % 2 == 0) for i, name in enumerate(SCHEMES)),
    *_each("every code", SCHEMES, weight="every code", bias=True),
    *_each("1 x 512 x 256", TYPICAL, rows=1, out=512, in_=256),
    *_each("17 x 512 x 256", TYPICAL, rows=17, out=512, in_=256),
    *_each("16 x 256 x 1024", ("w4a16_g128", "w8a8", "fp8_block", "mxfp4"), rows=16, out=256, in_=1024),
    _case("64 x 1024 x 512", "w4a16_g128_zp", rows=64, out=1024, in_=512),
    *_each("bfloat16 scales", ("w4a16_g64_zp", "w8a8"), scale_dtype=torch.bfloat16),
    *_each("float16 scales", ("w4a16_g64_zp", "w8a16"), scale_dtype=torch.float16),
    *_each("beside the usual", ("w8a16_g128_zp", "w4a16_g32_zp_actorder", "w4a8_g32_zp", "w8a16_actorder")),
    _case("batch 2 x 33", "w4a16_g128", rows=(2, 33)),
    _case("one vector", "w4a16_g128", rows=()),
    *(
        _case(f"{m} x {n} x {k}", name, True, rows=m, out=n, in_=k, bias=k != 1)
        for name in TYPICAL
        for m, n, k in ((0, 48, 128), (3, 5, 0), (2, 129, 257), (3, 7, 33), (1, 1, 1))
    ),
    _case("no outputs", "w4a16_g128", True, out=0),
    *_each("a last short group of 44", ("w4a16_g128", "w4a16_g128_zp", "w8a16_g128", "fp8_block"), True, in_=300),
    *_each("a last short group of 1", ("w4a16_g128_zp", "w4a16_g64_actorder", "w4a16_g32", "mxfp4"), True, in_=129),
    *_each("less than a group", ("w4a16_g128_zp", "w4a16_g64", "mxfp4", "fp8_block"), True, in_=31),
    _case("as many groups as outputs", "w4a16_g32_zp", True, out=10, weight="every code"),
    _case("as many blocks down as across", "fp8_block", True, out=200, in_=200, weight="every code"),
    *_each("zero points at both ends", ("w4a16_g128_zp", "w8a16_g128_zp"), True, weight="zero points 0 and 15"),
    *_each("zero groups", TYPICAL, True, weight="zero groups", out=140),
    *_each("tiny weights", TYPICAL, True, weight="tiny"),
    *(
        _case(special, name, True, weight=special)
        for special in ("zero scales", "negative scales", "subnormal scales")
        for name in ("w4a16_g128", "w4a16_g128_zp", "w8a8", "fp8_block", "fp8_row")
    ),
    *_each("outliers", ("w4a16_g128_zp", "fp8_tensor", "mxfp4"), True, weight="outliers"),
    *_each("NaN in one row of x", (*TYPICAL, *STATIC), True, x_special="NaN"),
    *_each("infinity in one row of x", ROUNDING, True, x_special="infinity"),
    *_each("ties", ROUNDING, True, x_special="ties", input_scale=0.25),
    *_each("zero rows", ROUNDING, True, x_special="zero rows"),
    *_each("beyond the scale", STATIC, True, x_special="beyond the scale"),
    *(
        _case(f"x with {layout}", name, True, layout=layout)
        for layout in ("gaps", "columns", "every other row")
        for name in ("w4a16_g128", "w4a16_g128_actorder", "w8a8", "fp8_row")
    ),
    _broken("w4a16_g128", "NaN scale", r"scales\[3, 1\] is nan; scales are finite"),
    _broken("fp8_tensor", "infinite scale", r"scales\[0, 0\] is inf"),
    _broken("mxfp4", "e8m0 NaN", r"scales\[3, 1\] is 255, an e8m0 NaN"),
    _broken("w4a16_g128_zp", "zero point 16", r"zeros\[2, 1\] is 16; 4-bit zero points are 0 to 15"),
    _broken("w4a16_g128_actorder", "feature named twice", "permutation leaves out feature"),
    _broken("w4a16_g128_actorder", "feature out of range", r"permutation\[7\] is 320; features"),
    _broken("w8a8_static", "input_scale 0", r"input_scale is 0\.0; it is a finite number above 0"),
    _broken("fp8_tensor_static", "input_scale NaN", "input_scale is nan"),
    _broken("w8a16", "bias too short", r"bias has shape \(47,\)", bias=True),
    _broken("w8a16", "x too narrow", r"weight has shape \(48, 320\).*with.*in=319"),
]
