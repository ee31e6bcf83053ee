"""Dynamic and static quantization of activations: SmoothQuant, Xiao et al. 2022, https://arxiv.org/abs/2211.10438, and
per token and 128 columns, DeepSeek-V3 2024, https://arxiv.org/abs/2412.19437."""

import math

import numpy as np
import torch

from llmkernels.contract import FLOATS, Case, Cost, View
from llmkernels.ops.numerics import itemsize, wide
from llmkernels.quant.activation import LARGEST, rounded, scaled
from llmkernels.registry import op


def inputs(rng, rows=5, hidden=256, special=None, scale=None, layout="rows", **options):
    rows = rows if isinstance(rows, tuple) else (rows,)
    x = rng.standard_normal((*rows, hidden)) * np.exp(rng.standard_normal((*rows, 1)))
    if special:
        SPECIALS[special](x)
    arrays = {"x": x, "scale": None if scale is None else np.full((), scale)}
    if layout == "gaps":  # the left part of wider rows
        arrays |= {
            "_wide": np.concatenate([x, np.full_like(x, np.nan)], -1),
            "x": View("_wide", (..., slice(0, hidden))),
        }
    if layout == "columns":
        arrays |= {"_columns": x.T, "x": View("_columns", axes=(1, 0))}
    return arrays | options


def _ties(x):
    """Multiples of 1/2 in rows whose scale is exactly 1: half of them lie between two integers."""
    x[:] = np.round(2 * 20 * x.clip(-3, 3)) / 2
    x[:, 0] = 127


def _zeros(x):
    x[::2] = 0


def _tiny(x):
    """Scales far below 1, then below the smallest normal float32, then a single subnormal number."""
    x[0] *= 1e-30
    x[1] *= 1e-37
    x[2] = 0
    x[2, 1] = 1e-39


def _huge(x):
    x[:] = np.clip(x * 1e4, -6e4, 6e4)


def _not_finite(x):
    x[1, 3], x[2, 0], x[3, -1] = np.nan, np.inf, -np.inf


SPECIALS = {"ties": _ties, "zero rows": _zeros, "tiny": _tiny, "huge": _huge, "not finite": _not_finite}


def check(call, sizes):
    if call["dtype"] not in LARGEST:
        raise ValueError(f"quantize_activation: dtype is {call['dtype']!r}; use {' or '.join(map(repr, LARGEST))}")
    group = call["group"]
    if isinstance(group, bool) or not isinstance(group, int) or group < 0:
        raise ValueError(f"quantize_activation: group is {group!r}; give a number of columns, or 0 for the whole row")
    if call["scale"] is not None and tuple(call["scale"].shape) not in ((), (1,)):
        raise ValueError(f"quantize_activation: scale has shape {tuple(call['scale'].shape)}; give one value, or None")


def check_values(call):
    if call["scale"] is not None and not 0 < (value := float(call["scale"].reshape(()))) < math.inf:
        raise ValueError(f"quantize_activation: scale is {value}; it is a finite number above 0: calibrate again")


def derive(call, sizes):
    group = call["group"]
    return {"groups": -(-sizes["hidden"] // group) if group else 1, "Q": call["dtype"]}


def cost(call, sizes):
    elements, rows = math.prod(call["x"].shape), math.prod(sizes["rows"])
    return Cost(elements * (itemsize(call["x"]) + 1) + 4 * rows * sizes["groups"], 3 * elements)


def _case(name, hostile=False, raises=None, **args):
    return Case(name, args, hostile, raises)


def _both(name, hostile=False, **args):
    return [_case(f"{dtype}, {name}", hostile, dtype=dtype, **args) for dtype in LARGEST]


CASES = [
    *_both("1 x 512", rows=1, hidden=512),
    *_both("7 x 1000", rows=7, hidden=1000),
    *_both("2 x 33 x 64", rows=(2, 33), hidden=64),
    *_both("9 x 512, group 128", rows=9, hidden=512, group=128),
    *_both("5 x 2048, group 64", rows=5, hidden=2048, group=64),
    *_both("static", scale=0.02),
    *_both("static, group 128", scale=0.25, group=128),
    *(case for name in SPECIALS for case in _both(name, True, special=name)),
    *(case for name in SPECIALS for case in _both(f"{name}, group 64", True, special=name, group=64)),
    *(case for name in SPECIALS for case in _both(f"{name}, static", True, special=name, scale=0.5)),
    *_both("static, values far beyond", True, scale=1e-4),
    *_both("gaps", True, layout="gaps"),
    *_both("columns", True, layout="columns"),
    *(_case(f"no row, group {group}", True, rows=0, group=group) for group in (0, 64)),
    *(_case(f"no column, group {group}", True, rows=3, hidden=0, group=group) for group in (0, 64)),
    _case("one vector", True, rows=(), hidden=96),
    _case("one column", True, hidden=1),
    _case("a last short group", True, hidden=100, group=64),
    _case("less than a group", True, hidden=33, group=128),
    _case("a wide row", True, rows=3, hidden=20000),
    _case("dtype is none", True, r"dtype is 'int4'; use 'int8' or 'float8_e4m3fn'", dtype="int4"),
    _case("negative group", True, r"group is -1; give a number", group=-1),
    _case("scale zero", True, r"scale is 0\.0; it is a finite number above 0", scale=0.0),
    _case("scale NaN", True, r"scale is nan", scale=math.nan),
]


@op(
    "x[*rows hidden]:T scale?[*one]:float32 -> values[*rows hidden]:Q scales[*rows groups]:float32",
    dtypes={"T": FLOATS, "Q": tuple(LARGEST)},
    cases=CASES,
    inputs=inputs,
    cost=cost,
    check=check,
    check_values=check_values,
    derive=derive,
)
def quantize_activation(x, *, dtype="int8", group=0, scale=None):
    """Round each row to 8 bits, with a scale for the row or for every `group` columns of it.

        scales[r, g] = max over the group of |x[r, h]| / largest      largest: 127 for int8, 448 for float8_e4m3fn
        values[r, h] = round(x[r, h] / scales[r, h // group])         ties to even

    Args:
        x: rows to quantize.
        dtype: of the values, 'int8' or 'float8_e4m3fn'.
        group: columns that share a scale, the last group may be short; 0 is the whole row.
        scale: one calibrated value, above 0, that takes the place of the computed ones; values saturate, to -128..127
            or -448..448.

    Returns:
        values, shape of x, and scales in float32, also where `scale` was given.  x / scale is computed in float32 (a
        reciprocal and a product are as good) and rounded once.  A group of zeros, and one whose scale would be below
        the smallest normal float32 (2 ** -126), has scale 1 and values 0.  A group with a NaN or an infinity in it has
        scale NaN and values 0, with a calibrated scale too: what is computed from it is NaN.  With x in float64, values
        are the ratios, saturated and not rounded: either neighbour of a ratio near the middle is right.

    Raises:
        ValueError: another dtype, a negative group, a scale that is not one finite number above 0.
    """
    ratio, scales = scaled(wide(x), dtype, group, scale)
    if x.dtype == torch.float64:
        return ratio, scales
    return rounded(ratio, dtype).to(getattr(torch, dtype)), scales
