"""RMS normalisation on a TPU: the sum of squares and the scaled row in one pass over x (_rows.py)."""

import math

import jax.numpy as jnp
from jax import lax

from ._numbers import carried, multiplied_as
from ._rows import choose, chunk_of, each, over_columns, over_rows, refuse_long, strip_of, wide
from ._rows import pays as large

__all__ = ["pays", "plan", "run", "takes"]


def takes(x, weight, *, residual, eps):
    """Yield (code, reason, fix) for what the kernel does not take."""
    if 0 in x.shape:
        yield "SHAPE", f"x is {list(x.shape)}; a grid needs a row", "give at least one row and one column"
    arrays = 2 if residual is None else 4
    yield from refuse_long(strip_of(x.dtype), *[(x.shape[-1:], multiplied_as(x.dtype))] * arrays)


def pays(x, weight, *, residual, eps):
    return large(x)


def run(x, weight, *, residual, eps):
    hidden, kept = x.shape[-1], residual is not None
    out = multiplied_as(x.dtype)
    strip = strip_of(x.dtype, out)
    chunk, costly = chunk_of(strip), x.dtype == jnp.float16

    def body(at, *refs):
        x, *residuals, gain, y = refs[: 3 + kept]

        def value(columns):
            s = wide(x, at, columns)
            return s + wide(residuals[0], at, columns) if kept else s

        total = over_columns(strip, hidden, chunk, lambda columns: value(columns) ** 2, jnp.add, jnp.sum, costly)
        factor = lax.rsqrt(total * (1 / hidden) + eps)

        def store(columns, _):
            s = value(columns)
            y[at, columns] = (s * factor * gain[:, columns]).astype(y.dtype)
            if kept:
                refs[-1][at, columns] = s.astype(y.dtype)

        each(hidden, chunk, store, costly=costly)

    rows = [carried(array.reshape(-1, hidden)) for array in (x, residual) if array is not None]
    gain = weight.astype(jnp.float32).reshape(1, hidden)
    results = over_rows(body, rows, [((hidden,), out)] * (1 + kept), name="rms_norm", strip=strip, shared=[gain])
    results = [y.astype(x.dtype).reshape(x.shape) for y in results]
    return tuple(results) if kept else results[0]


def plan(x, weight, *, residual=None, **options):
    """What the cost model chose, in words, for `explain`."""
    rows = (math.prod(x.shape[:-1]), x.shape[-1])
    return str(choose([(rows, x.dtype)] * (2 if residual is None else 4), strip_of(x.dtype)))
