"""The calls of norm_linear_activation worth making, and how their inputs are drawn."""

import math

import numpy as np

from llmkernels.contract import Case, View
from llmkernels.ops.quantized_gemm_cases import ROUNDING, TYPICAL, coarse, quantized, settled
from llmkernels.quant import SCHEMES

EVERYTHING = {"norm_weight": True, "residual": True, "bias": True, "return_residual": True, "activation": "swiglu"}


def inputs(
    rng,
    rows=5,
    features=64,
    in_=96,
    scheme=None,
    norm="rms",
    norm_weight=False,
    norm_bias=False,
    residual=False,
    bias=False,
    special=None,
    layout="rows",
    break_it=None,
    **options,
):
    rows = rows if isinstance(rows, tuple) else (rows,)
    arrays = {
        "x": coarse(rng.standard_normal((*rows, in_))),
        "weight": rng.standard_normal((features, in_)) / math.sqrt(max(in_, 1)),
        "norm_weight": coarse(1 + 0.3 * rng.standard_normal(in_)) if norm_weight else None,
        "norm_bias": coarse(0.3 * rng.standard_normal(in_)) if norm_bias else None,
        "residual": coarse(rng.standard_normal((*rows, in_))) if residual else None,
        "bias": rng.standard_normal(features) if bias else None,
    }
    if scheme:
        arrays["weight"] = quantized(rng, scheme, features, in_)
    if special:
        SPECIALS[special](arrays)
    if scheme and arrays["weight"].scheme.activation:
        arrays["x"] = settled(
            rng, arrays["x"], arrays["weight"], lambda x: _normed(x, arrays, norm, options.get("eps", 1e-6))
        )
    if break_it:
        BREAKS[break_it](arrays)
    return LAYOUTS[layout](arrays, in_) | {"norm": norm} | options


def _normed(x, arrays, norm, eps):
    """What the product sees, in float64."""
    s = x if arrays["residual"] is None else x + arrays["residual"]
    if norm == "none" or not s.size:
        return s
    s = s - s.mean(-1, keepdims=True) if norm == "layer" else s
    s = s / np.sqrt((s * s).mean(-1, keepdims=True) + eps)
    s = s if arrays["norm_weight"] is None else s * arrays["norm_weight"]
    return s if arrays["norm_bias"] is None else s + arrays["norm_bias"]


def _zero_row(arrays):
    arrays["x"][1] = 0
    if arrays["residual"] is not None:
        arrays["residual"][1] = 0


def _nan_row(arrays):
    arrays["x"][1, 3] = np.nan


def _offset(arrays):
    """Rows whose mean is far larger than what they vary by."""
    arrays["x"] = coarse(30 + arrays["x"])


def _sum_beyond_float16(arrays):
    """Each summand is a float16; their sum is none."""
    arrays["x"][:] = coarse(40000 * np.sign(arrays["x"]))
    arrays["residual"][:] = arrays["x"]


def _cancelling(arrays):
    """A small sum of two large summands, that one rounding on the way would lose."""
    arrays["residual"] = coarse(1000 * np.sign(arrays["x"]))
    arrays["x"] = coarse(arrays["x"] - arrays["residual"])


def _large_products(arrays):
    """Arguments of the activation far into both tails."""
    arrays["bias"][::2] = 100
    arrays["bias"][1::2] = -100


def _small(arrays):
    """Mean squares around eps."""
    arrays["x"] = coarse(arrays["x"] / 64)


SPECIALS = {
    "a row of zeros": _zero_row,
    "NaN in a row": _nan_row,
    "mean far from zero": _offset,
    "x + residual beyond float16": _sum_beyond_float16,
    "x + residual cancels": _cancelling,
    "far tails": _large_products,
    "small x": _small,
}
SUMS = ("a row of zeros", "x + residual beyond float16", "x + residual cancels")  # with a residual


def _gaps(arrays, in_):
    """x and the residual as the left parts of wider rows."""
    views = {name: View(f"_{name}", (..., slice(0, in_))) for name in ("x", "residual") if arrays[name] is not None}
    wide = {f"_{n}": np.concatenate([arrays[n], np.full_like(arrays[n], np.nan)], -1) for n in views}
    return arrays | wide | views


def _weight_by_column(arrays, in_):
    return arrays | {"_weight": arrays["weight"].T, "weight": View("_weight", axes=(1, 0))}


def _part_of_a_weight(arrays, in_):
    """Rows and columns cut out of a larger matrix."""
    features = arrays["weight"].shape[0]
    larger = np.full((features + 16, in_ + 8), np.nan)
    larger[16:, 8:] = arrays["weight"]
    return arrays | {"_weight": larger, "weight": View("_weight", (slice(16, None), slice(8, None)))}


LAYOUTS = {
    "rows": lambda arrays, in_: arrays,
    "gaps": _gaps,
    "weight by column": _weight_by_column,
    "part of a weight": _part_of_a_weight,
}


def _shorten(name):
    def change(arrays):
        arrays[name] = arrays[name][..., :-1]

    return change


BREAKS = {f"{name} too short": _shorten(name) for name in ("norm_weight", "residual", "bias", "x")}

PLAIN = ("none", "silu", "gelu", "gelu_tanh", "relu")
GATED = ("swiglu", "geglu")


def _case(name, hostile=False, raises=None, **args):
    return Case(name, args, hostile, raises)


def _each(name, schemes, hostile=False, **args):
    return [_case(f"{scheme}, {name}", hostile, scheme=scheme, **args) for scheme in schemes]


def _normed_case(name, norm, hostile=False, **args):
    """With every array that this norm may have."""
    gains = {"rms": ("norm_weight",), "layer": ("norm_weight", "norm_bias"), "none": ()}[norm]
    return _case(f"{norm}, {name}", hostile, norm=norm, **dict.fromkeys(gains, True), **args)


CASES = [
    *(
        _normed_case(activation, norm, activation=activation, residual=i % 2 == 0, bias=i % 3 == 0)
        for norm in ("rms", "layer", "none")
        for i, activation in enumerate((*PLAIN, *GATED))
    ),
    _case("rms, everything", **EVERYTHING),
    _case("layer, everything", norm="layer", norm_bias=True, **EVERYTHING),
    _case("no norm, residual", norm="none", residual=True, return_residual=True),
    _case("rms without weight", in_=320),
    _case("layer without weight", norm="layer"),
    _case("layer with bias only", norm="layer", norm_bias=True),
    _case("a large eps", eps=0.1, norm_weight=True),
    *(
        _case(f"{m} x {n} x {k}", rows=m, features=n, in_=k, **EVERYTHING)
        for m, n, k in ((1, 1024, 512), (17, 512, 512), (64, 256, 1024), ((2, 33), 128, 256), ((), 64, 128))
    ),
    *(
        _case(f"{name}, rms", scheme=name, in_=320, norm_weight=True, residual=i % 2 == 0, bias=i % 3 == 0)
        for i, name in enumerate(SCHEMES)
    ),
    *_each("rms, everything", TYPICAL, in_=256, **EVERYTHING),
    *_each("layer, everything", TYPICAL, in_=256, norm="layer", norm_bias=True, **EVERYTHING),
    *_each("no norm, gelu", ("w4a16_g64", *ROUNDING), in_=200, norm="none", activation="gelu", residual=True),
    *(
        _case(f"{name}, {activation}", scheme=name, in_=128, activation=activation, bias=True)
        for name in ("w4a16_g128_zp", "w8a8")
        for activation in (*PLAIN, *GATED)
    ),
    *_each("17 x 512 x 512", ("w4a16_g128", "w8a8", "fp8_block"), rows=17, features=512, in_=512, **EVERYTHING),
    *(
        _case(f"{m} rows, {n} features, {k} channels", True, rows=m, features=n, in_=k, **EVERYTHING)
        for m, n, k in ((0, 64, 96), (3, 6, 0), (3, 0, 64), (2, 130, 257), (3, 2, 1), (7, 130, 33))
    ),
    *(
        _case(f"{name}, {m} x {n} x {k}", True, scheme=name, rows=m, features=n, in_=k, bias=True, norm_weight=True)
        for name in ("w4a16_g128_zp", "w4a16_g128_actorder", "w8a8", "fp8_block", "mxfp4")
        for m, n, k in ((0, 64, 128), (3, 6, 0), (2, 130, 257), (3, 37, 33))
    ),
    *(
        _normed_case(special, norm, True, special=special, residual=special in SUMS, bias=True)
        for norm in ("rms", "layer")
        for special in SPECIALS
    ),
    *(
        _case(f"far tails, {activation}", True, special="far tails", activation=activation, bias=True)
        for activation in (*PLAIN, *GATED)
    ),
    *(
        _case(f"{name}, {special}", True, scheme=name, special=special, residual=True, norm_weight=True, in_=256)
        for name in ("w4a16_g128", "w8a8", "fp8_row")
        for special in ("NaN in a row", *SUMS)
    ),
    *(_case(layout, True, layout=layout, **EVERYTHING) for layout in LAYOUTS if layout != "rows"),
    *_each("gaps", ("w4a16_g128_actorder", "w8a8"), True, layout="gaps", in_=256, **EVERYTHING),
    _case("unknown norm", True, "norm is 'batch'; use one of rms, layer, none", norm="batch"),
    _case("unknown activation", True, "activation is 'tanh'; use one of", activation="tanh"),
    _case("gain without a norm", True, "norm_weight is given, but norm is 'none'", norm="none", norm_weight=True),
    _case("norm_bias with rms", True, "norm_bias is given, but norm is 'rms'", norm_bias=True),
    _case("odd features, gated", True, "features=63 is odd; swiglu", activation="swiglu", features=63),
    _case("residual returned, none given", True, "return_residual is True, but residual", return_residual=True),
    _case("eps 0", True, "eps is 0; give a number above 0", eps=0),
    _case("eps NaN", True, "eps is nan", eps=math.nan),
    *(
        _case(name, True, words, break_it=name, norm_weight=True, residual=True, bias=True)
        for name, words in {
            "norm_weight too short": r"norm_weight has shape \(95,\)",
            "residual too short": r"residual has shape \(5, 95\)",
            "bias too short": r"bias has shape \(63,\)",
            "x too short": r"weight has shape \(64, 96\).*in=95",
        }.items()
    ),
]
