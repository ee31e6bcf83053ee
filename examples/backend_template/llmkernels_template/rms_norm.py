"""RMS normalisation: sums in float32, one rounding at the end."""

import numpy as np

from ._arrays import like, reasons, wide

TRAITS = {"deterministic": True, "accumulate": "float32"}


def refuse(x, weight, *, residual=None, eps=1e-6):
    yield from reasons(x=x)  # the contract gives weight and residual the dtype and device of x


def run(x, weight, *, residual=None, eps=1e-6):
    s = wide(x) if residual is None else wide(x) + wide(residual)
    y = s / np.sqrt(np.square(s).mean(-1, keepdims=True) + eps) * wide(weight)
    return like(y, x) if residual is None else (like(y, x), like(s, x))
