"""Rows rounded to 8 bits on a TPU: peak, scale and values of a strip of rows while it lies in VMEM (_rows.py).

Both kinds of values leave as bytes: not every generation casts to FP8, so its code is made of integers.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from .._rounding import LARGEST, LOWEST, SMALLEST
from ._numbers import LANES, carried
from ._rows import choose, chunk_of, each, over_columns, over_rows, refuse_long, strip_of, wide
from ._rows import pays as large

__all__ = ["pays", "plan", "run", "takes"]

SMALL = 127 - 6  # exponent of the smallest normal e4m3, as a float32 has it
WHOLE = 1.5 * 2**23
INFINITE = 0x7F800000  # bits of an infinity; those of a NaN are more
GROUPS = (16, 32, 64, *range(LANES, 4 * LANES + 1, LANES))  # columns that share a scale


def takes(x, *, dtype, group, scale):
    """Yield (code, reason, fix) for what the kernel does not take."""
    if 0 in x.shape:
        yield "SHAPE", f"x is {list(x.shape)}; a grid needs a row", "give at least one row and one column"
    if group and group not in GROUPS:
        reason = f"group={group}; takes groups of {', '.join(map(str, GROUPS))}"
        yield "SHAPE", reason, f"quantize in groups of {LANES}"
    yield from refuse_long(strip_of(jnp.int8), ((x.shape[-1],), x.dtype), ((x.shape[-1],), jnp.int8))


def pays(x, *, dtype, group, scale):
    return large(x)


def run(x, *, dtype, group, scale):
    hidden = x.shape[-1]
    groups = -(-hidden // group) if group else 1
    strip = strip_of(x.dtype, jnp.int8)
    chunk = max(group, LANES) if group else chunk_of(strip)
    fixed = [] if scale is None else [scale.astype(jnp.float32).reshape(1, 1)]
    costly = dtype != "int8" or x.dtype == jnp.float16
    code = _int8 if dtype == "int8" else _e4m3

    def body(at, x, *refs):
        *given, values, scales, inverses = refs

        def size(columns):
            """|x|, infinite where x is NaN; by bits, since no order of NaN is promised: [strip columns]."""
            bits = lax.bitcast_convert_type(wide(x, at, columns), jnp.int32) & 0x7FFFFFFF
            return lax.bitcast_convert_type(jnp.minimum(bits, INFINITE), jnp.float32)

        def scale_of(top):
            """(scale, its reciprocal, zero where not all is finite) for the largest sizes [strip 1]."""
            if given:
                found = jnp.broadcast_to(given[0][...], top.shape)
            else:
                found = top / LARGEST[dtype]
                found = jnp.where(found < SMALLEST, 1.0, found)
            finite = top < jnp.inf
            return jnp.where(finite, found, jnp.nan), jnp.where(finite, 1.0 / found, 0.0)

        def store(columns, inverse):
            ratio = wide(x, at, columns) * inverse
            ratio = jnp.where(ratio == ratio, ratio, 0.0)  # what is not finite, times zero
            values[at, columns] = code(ratio).astype(jnp.int8)

        if not group:
            scales[at, :], inverses[...] = scale_of(over_columns(strip, hidden, chunk, size, jnp.maximum, jnp.max))
            each(hidden, chunk, lambda columns, _: store(columns, inverses[...]), costly=costly)
            return

        lane = lax.broadcasted_iota(jnp.int32, (strip, groups), 1)

        def store_groups(columns, _):
            sizes, first = size(columns), lax.div(columns.start, jnp.int32(group))
            column = lax.broadcasted_iota(jnp.int32, sizes.shape, 1)
            inverse: Any = None
            for i in range(-(-columns.size // group)):
                own = (column >= i * group) & (column < (i + 1) * group)
                scale, one = scale_of(jnp.max(jnp.where(own, sizes, 0.0), axis=1, keepdims=True))
                scales[at, :] = jnp.where(lane == first + i, scale, scales[at, :])
                inverse = one if inverse is None else jnp.where(own, one, inverse)
            store(columns, inverse)

        each(hidden, chunk, store_groups, costly=costly)

    values, scales = over_rows(
        body, [carried(x.reshape(-1, hidden))], [((hidden,), jnp.int8), ((groups,), jnp.float32)],
        name="quantize_activation", strip=strip, shared=fixed,
        scratch=[pltpu.VMEM((strip, 1), jnp.float32)],
    )  # fmt: skip
    values = lax.bitcast_convert_type(values, jnp.dtype(dtype))
    return values.reshape(x.shape), scales.reshape(*x.shape[:-1], groups)


def _int8(ratio):
    return _rounded(jnp.clip(ratio, LOWEST["int8"], LARGEST["int8"]))


def _e4m3(ratio):
    """The code of each float32, saturated, ties to even: 8 steps to a power of two, below 2 ** -6 all alike."""
    size = jnp.minimum(jnp.abs(ratio), LARGEST["float8_e4m3fn"])
    exponent = jnp.maximum(lax.bitcast_convert_type(size, jnp.int32) >> 23, SMALL)
    per_unit = lax.bitcast_convert_type((2 * 127 + 3 - exponent) << 23, jnp.float32)
    code = ((exponent - SMALL) << 3) + _rounded(size * per_unit)
    return code | ((lax.bitcast_convert_type(ratio, jnp.int32) >> 24) & 0x80)


def _rounded(x):
    """The nearest int32, ties to even, of float32 within 2 ** 22 of zero: the sum with WHOLE has no fraction left."""
    whole = lax.bitcast_convert_type(jnp.float32(WHOLE), jnp.int32)
    return lax.bitcast_convert_type(x + WHOLE, jnp.int32) - whole


def plan(x, *, group=0, **options):
    """What the cost model chose, in words, for `explain`."""
    rows, hidden = math.prod(x.shape[:-1]), x.shape[-1]
    groups = -(-hidden // group) if group else 1
    shapes = [((rows, hidden), x.dtype), ((rows, hidden), jnp.int8), ((rows, groups), jnp.float32)]
    return str(choose(shapes, strip_of(x.dtype, jnp.int8)))
