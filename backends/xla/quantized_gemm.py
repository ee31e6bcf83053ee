"""x @ wT for a quantized weight in jax.numpy: the weight is widened on its way into the product."""

import jax

from ._products import product
from ._program import Program, refusals
from ._torch import over_rows
from ._weight import Weight

TRAITS = {"deterministic": True, "accumulate": "float32"}


def refuse(x, weight, *, bias):
    return refusals("quantized_gemm", x, weight, bias=bias)


def plain(x, weight, *, bias=None):
    y = product(x.astype("float32"), weight)
    return (y if bias is None else y + bias.astype("float32")).astype(x.dtype)


program = Program(plain)


def run(x, weight, *, bias=None):
    if isinstance(x, jax.Array):
        return program(x, Weight.of(weight), bias=bias)
    return over_rows(program, x, weight, bias=bias)
