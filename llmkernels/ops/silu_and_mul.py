"""The gate of SwiGLU: Shazeer 2020, https://arxiv.org/abs/2002.05202."""

import torch

from llmkernels.contract import FLOATS, Case, Cost, View, named
from llmkernels.ops.numerics import itemsize, wide
from llmkernels.registry import op
from llmkernels.shapes import grid


def inputs(rng, rows, width, size=1.0, strided=False, odd=0):
    rows = rows if isinstance(rows, tuple) else (rows,)
    x = size * rng.standard_normal((*rows, 2 * width + odd))
    return {"_wide": x, "x": View("_wide", (..., slice(1, 1 + 2 * (width - 1))))} if strided else {"x": x}


def check(call, sizes):
    if sizes["two_width"] % 2:
        raise ValueError(
            f"silu_and_mul: the last dimension of x is {sizes['two_width']}; give the gate and then the value, "
            f"equally wide"
        )


def derive(call, sizes):
    return {"width": sizes["two_width"] // 2}


def cost(call, sizes):
    outputs = call["x"].numel() // 2
    return Cost(3 * outputs * itemsize(call["x"]), 5 * outputs)


@op(
    "x[*rows two_width]:T -> y[*rows width]:T",
    dtypes={"T": FLOATS},
    cases=[
        *named(grid(rows=[1, 7, (2, 33)], width=[64, 500, 4096])),
        Case("strided", {"rows": 7, "width": 65, "strided": True}),
        *named(grid(rows=[0, (2, 0)], width=[64]) + grid(rows=[5], width=[0, 1, 3, 20000]), hostile=True),
        Case("one row, no other dimension", {"rows": (), "width": 64}, hostile=True),
        Case("large values", {"rows": 5, "width": 64, "size": 50.0}, hostile=True),
        Case("odd width", {"rows": 2, "width": 4, "odd": 1}, True, "last dimension of x is 9; give the gate"),
    ],
    inputs=inputs,
    cost=cost,
    check=check,
    derive=derive,
)
def silu_and_mul(x):
    """Multiply the second half of each row by the SiLU of the first.

        y[r, j] = g / (1 + exp(-g)) * x[r, width + j]        g = x[r, j], width = two_width / 2

    Args:
        x: rows of gate and value, one after the other; rows may have gaps between them.

    Returns:
        y, rounded once to the dtype of x.
    """
    gate, value = wide(x).unflatten(-1, (2, x.shape[-1] // 2)).unbind(-2)
    return (torch.nn.functional.silu(gate) * value).to(x.dtype)
