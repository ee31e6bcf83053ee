"""RMS normalisation, Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467."""

import torch

from llmkernels.contract import FLOATS, Cost, named
from llmkernels.ops.numerics import itemsize, wide
from llmkernels.registry import op
from llmkernels.shapes import grid


def inputs(rng, rows, hidden, eps=1e-6, residual=False, zero_row=False):
    rows = rows if isinstance(rows, tuple) else (rows,)
    x = rng.standard_normal((*rows, hidden))
    if zero_row:
        x[0] = 0
    return {
        "x": x,
        "weight": 1 + 0.3 * rng.standard_normal(hidden),
        "residual": rng.standard_normal((*rows, hidden)) if residual else None,
        "eps": eps,
    }


def cost(call, sizes):
    streams = 4 if call["residual"] is not None else 2  # x and y; with a residual, two more
    elements = call["x"].numel()
    return Cost((streams * elements + sizes["hidden"]) * itemsize(call["x"]), 4 * elements)


def check(call, sizes):
    if not call["eps"] > 0:
        raise ValueError(f"rms_norm: eps is {call['eps']}; give a number above 0, so that a row of zeros stays finite")


def returns(call):
    return ("y",) if call["residual"] is None else ("y", "residual_out")


@op(
    """x[*rows hidden]:T weight[hidden]:T residual?[*rows hidden]:T
    -> y[*rows hidden]:T residual_out?[*rows hidden]:T""",
    dtypes={"T": FLOATS},
    cases=[
        *named(grid(rows=[1, 7, (2, 33)], hidden=[64, 1000, 4096], residual=[False, True])),
        *named(grid(rows=[0], hidden=[64]) + grid(rows=[3], hidden=[64], zero_row=[True]), hostile=True),
        *named(grid(rows=[5], hidden=[1, 3, 20000]), hostile=True),
    ],
    inputs=inputs,
    cost=cost,
    check=check,
    returns=returns,
)
def rms_norm(x, weight, *, residual=None, eps=1e-6):
    """Add the residual, divide each row by its root mean square, scale it by `weight`.

        s = x + residual
        y[r, h] = weight[h] * s[r, h] / sqrt(mean over h of s[r, h]^2 + eps)

    Args:
        x: rows to normalise.
        weight: one gain per channel, in the dtype of x.
        residual: added to x first; None adds nothing.
        eps: added to the mean square; a row of zeros stays zeros.

    Returns:
        y, shape and dtype of x; with a residual also residual_out = s, rounded to the dtype of x.  Sums are kept in
        float32 from the inputs to the one rounding at the store: y is computed from s before it is rounded.
    """
    s = wide(x) if residual is None else wide(x) + wide(residual)
    y = s / torch.sqrt((s * s).mean(-1, keepdim=True) + eps) * wide(weight)
    return y.to(x.dtype) if residual is None else (y.to(x.dtype), s.to(x.dtype))
