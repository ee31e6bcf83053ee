"""Rows rounded to 8 bits on a TPU: peak, scale and values of a strip of rows while it lies in VMEM (_rows.py).

Both kinds of values leave as bytes: not every generation casts to FP8, so its code is made of integers.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from .._rounding import LARGEST, LOWEST, SMALLEST
from ._numbers import LANES, carried
from ._rows import choose, chunk_of, each, over_columns, over_rows, refuse_long, strip_of, wide
from ._rows import pays as large

__all__ = ["pays", "plan", "run", "takes"]

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
    code = _int8 if dtype == "int8" else _e4m3

    def body(at, x, *refs):
        *given, values, scales = refs

        def size(columns):
            """|x|, infinite where x is NaN; by bits, since no order of NaN is promised: [strip columns]."""
            bits = lax.bitcast_convert_type(wide(x, at, columns), jnp.int32) & 0x7FFFFFFF
            return lax.bitcast_convert_type(jnp.minimum(bits, INFINITE), jnp.float32)

        def scale_of(top):
            """(scale, its reciprocal, whether all is finite) for the largest sizes [strip 1]."""
            if given:
                found = jnp.broadcast_to(given[0][...], top.shape)
            else:
                found = top / LARGEST[dtype]
                found = jnp.where(found < SMALLEST, 1.0, found)
            finite = top < jnp.inf
            return jnp.where(finite, found, jnp.nan), 1.0 / found, finite

        def store(columns, ratio, finite):
            ratio = jnp.clip(ratio, LOWEST[dtype], LARGEST[dtype])
            values[at, columns] = code(jnp.where(finite, ratio, 0.0)).astype(jnp.int8)

        if not group:
            scale, inverse, finite = scale_of(over_columns(strip, hidden, chunk, size, jnp.maximum, jnp.max))
            each(hidden, chunk, lambda c, _: store(c, wide(x, at, c) * inverse, finite))
            scales[at, :] = scale
            return

        lane = lax.broadcasted_iota(jnp.int32, (strip, groups), 1)

        def store_groups(columns, all_scales):
            sizes, first = size(columns), lax.div(columns.start, jnp.int32(group))
            column = lax.broadcasted_iota(jnp.int32, sizes.shape, 1)
            inverse: Any = None
            finite: Any = None
            for i in range(-(-columns.size // group)):
                own = (column >= i * group) & (column < (i + 1) * group)
                scale, one, whole = scale_of(jnp.max(jnp.where(own, sizes, 0.0), axis=1, keepdims=True))
                all_scales = jnp.where(lane == first + i, scale, all_scales)
                inverse = one if inverse is None else jnp.where(own, one, inverse)
                whole = whole.astype(jnp.float32)
                finite = whole if finite is None else jnp.where(own, whole, finite)
            store(columns, wide(x, at, columns) * inverse, finite > 0)
            return all_scales

        scales[at, :] = each(hidden, chunk, store_groups, jnp.zeros((strip, groups), jnp.float32))

    values, scales = over_rows(
        body, [carried(x.reshape(-1, hidden))], [((hidden,), jnp.int8), ((groups,), jnp.float32)],
        name="quantize_activation", strip=strip, shared=fixed,
    )  # fmt: skip
    values = lax.bitcast_convert_type(values, jnp.dtype(dtype))
    return values.reshape(x.shape), scales.reshape(*x.shape[:-1], groups)


def _int8(ratio):
    return jnp.round(ratio).astype(jnp.int32)


def _e4m3(ratio):
    """The code of each saturated float32, ties to even: steps of 2 ** -9 below 2 ** -6, above 3 bits of fraction."""
    bits = lax.bitcast_convert_type(ratio, jnp.int32)
    size = bits & 0x7FFFFFFF
    small = jnp.round(jnp.abs(ratio) * 512.0).astype(jnp.int32)
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    return jnp.where(size < (121 << 23), small, normal) | ((bits >> 24) & 0x80)


def plan(x, *, group=0, **options):
    """What the cost model chose, in words, for `explain`."""
    rows, hidden = math.prod(x.shape[:-1]), x.shape[-1]
    groups = -(-hidden // group) if group else 1
    shapes = [((rows, hidden), x.dtype), ((rows, hidden), jnp.int8), ((rows, groups), jnp.float32)]
    return str(choose(shapes, strip_of(x.dtype, jnp.int8)))
