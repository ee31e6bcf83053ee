"""RMS normalisation in jax.numpy."""

import jax
import jax.numpy as jnp

from ._program import Program, refusals
from ._torch import over_rows

TRAITS = {"deterministic": True, "accumulate": "float32"}


def refuse(x, weight, *, residual, eps):
    return refusals("rms_norm", x, weight, residual=residual, eps=eps)


def plain(x, weight, *, residual=None, eps=1e-6):
    s = x.astype("float32") if residual is None else x.astype("float32") + residual.astype("float32")
    y = s / jnp.sqrt((s * s).mean(-1, keepdims=True) + float(eps)) * weight.astype("float32")
    return y.astype(x.dtype) if residual is None else (y.astype(x.dtype), s.astype(x.dtype))


program = Program(plain)


def run(x, weight, *, residual=None, eps=1e-6):
    if isinstance(x, jax.Array):
        return program(x, weight, residual=residual, eps=eps)
    return over_rows(program, x, weight, beside=("residual",), residual=residual, eps=eps)
