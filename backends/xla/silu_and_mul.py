"""The gate of SwiGLU in jax.numpy."""

import jax
import jax.numpy as jnp

from ._program import Program, refusals
from ._torch import over_rows

TRAITS = {"deterministic": True, "accumulate": "float32"}


def refuse(x):
    return refusals("silu_and_mul", x)


def plain(x):
    gate, value = jnp.split(x.astype("float32"), 2, -1)
    return (jax.nn.silu(gate) * value).astype(x.dtype)


program = Program(plain)


def run(x):
    return program(x) if isinstance(x, jax.Array) else over_rows(program, x)
