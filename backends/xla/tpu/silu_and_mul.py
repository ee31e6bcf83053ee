"""The gate of SwiGLU on a TPU: both halves of a row are windows of one array (_rows.py)."""

import math

import jax.numpy as jnp

from ._numbers import LANES, carried, multiplied_as
from ._rows import choose, chunk_of, each, over_rows, refuse_long, strip_of, wide
from ._rows import pays as large

__all__ = ["pays", "plan", "run", "takes"]


def takes(x):
    """Yield (code, reason, fix) for what the kernel does not take."""
    if 0 in x.shape:
        yield "SHAPE", f"x is {list(x.shape)}; a grid needs a row", "give at least one row and one column"
    yield from refuse_long(strip_of(x.dtype), *[((x.shape[-1] // 2,), multiplied_as(x.dtype))] * 3)


def pays(x):
    return large(x)


def run(x):
    width, out = x.shape[-1] // 2, multiplied_as(x.dtype)
    strip = strip_of(x.dtype, out)

    def body(at, gate, value, y):
        def store(columns, _):
            g = wide(gate, at, columns)
            y[at, columns] = (g / (1.0 + jnp.exp(-g)) * wide(value, at, columns)).astype(y.dtype)

        costly = x.dtype == jnp.float16  # its bits become float32 in many steps
        each(width, chunk_of(strip) // (2 if costly else 1), store, costly=costly)

    rows = carried(x.reshape(-1, 2 * width))
    halves = [(rows, 0), (rows, 1)] if width % LANES == 0 else [rows[:, :width], rows[:, width:]]
    (y,) = over_rows(body, halves, [((width,), out)], name="silu_and_mul", strip=strip)
    return y.astype(x.dtype).reshape(*x.shape[:-1], width)


def plan(x):
    """What the cost model chose, in words, for `explain`."""
    rows = (math.prod(x.shape[:-1]), x.shape[-1])
    return str(choose([(rows, x.dtype), ((rows[0], rows[1] // 2), x.dtype)], strip_of(x.dtype)))
