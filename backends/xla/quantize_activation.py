"""Rows rounded to 8 bits in jax.numpy."""

import jax

from ._program import Program, refusals
from ._rounding import scaled, stored
from ._torch import over_rows

TRAITS = {"deterministic": True, "accumulate": "float32"}


def refuse(x, *, dtype, group, scale):
    return refusals("quantize_activation", x, dtype=dtype, group=group, scale=scale)


def plain(x, *, dtype="int8", group=0, scale=None):
    ratio, scales = scaled(x.astype("float32"), dtype, group, scale)
    return stored(ratio, dtype), scales


program = Program(plain)


def run(x, *, dtype="int8", group=0, scale=None):
    if isinstance(x, jax.Array):
        return program(x, dtype=dtype, group=group, scale=scale)
    return over_rows(program, x, dtype=dtype, group=group, scale=scale)
