"""Rows of x rounded to int8 before a product of many rows: while a block of rows lies in VMEM, its peaks, then values.

A row's scale comes as a row of 128 lanes, as the product's epilogue wants it.  Of a row that is not finite the scale is
NaN, and so is all that the product makes of it: its values may be anything.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .._rounding import LARGEST, LOWEST, SMALLEST
from ._numbers import LANES, tile_rows
from ._tiles import divisor

STRIP = tile_rows(jnp.int8)
ROWS = 256  # of a block: between the peaks of its strips and their values others fill the bundles
AT_ONCE = 4096  # columns
LOOKED_AT = 2 * LANES  # columns of a strip, for its peak; half, and half the rows, where registers hold float32
WHOLE = 1.5 * 2**23  # a number within 2 ** 22 of zero, added to it, has no fraction left


def rounded_rows(x, scale, *, chip, interpret):
    """(int8 [rows columns], scales float32 [rows LANES]) of x bfloat16 or float32, rows in strips, columns in lanes.

    Args:
        scale: float32 [1], calibrated, or None.
    """
    rows, columns = x.shape
    short = chip.matrix > LANES  # it has arithmetic of 16 bits
    m = height(rows, columns, x.dtype.itemsize, chip)
    given = [] if scale is None else [scale.astype(jnp.float32).reshape(1, 1)]
    return pl.pallas_call(
        functools.partial(_round, bool(given), short),
        grid=(rows // m,),
        in_specs=[pl.BlockSpec((m, columns), lambda i: (i, 0)), *[pl.BlockSpec((1, 1), lambda i: (0, 0))] * len(given)],
        out_specs=[pl.BlockSpec((m, columns), lambda i: (i, 0)), pl.BlockSpec((m, LANES), lambda i: (i, 0))],
        out_shape=[jax.ShapeDtypeStruct((rows, columns), jnp.int8), jax.ShapeDtypeStruct((rows, LANES), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=chip.vmem_limit),
        name="rounded_rows",
        interpret=interpret,
    )(x, *given)


def height(rows, columns, size, chip):
    """Rows of a block, of which VMEM holds two: x in numbers of `size` bytes, and bytes."""
    fitting = chip.vmem_limit // 2 // (2 * columns * (size + 1))
    return divisor(rows, max(STRIP, min(ROWS if chip.matrix > LANES else ROWS // 2, fitting)), STRIP)


def _round(given, short, x, *refs):
    *known, values, scales = refs
    rows, width = x.shape[0], divisor(x.shape[1], AT_ONCE, LANES)
    strips = [pl.ds(first, STRIP) for first in range(0, rows, STRIP)]
    turns, looked_at = x.shape[1] // width, divisor(width, LOOKED_AT if short else LANES, LANES)
    kind = x.dtype if short else jnp.dtype(jnp.float32)

    def larger(i, peaks):
        largest = []
        for strip, peak in zip(strips, peaks, strict=True):
            for at in range(0, width, looked_at):
                peak = jnp.maximum(peak, jnp.abs(x[strip, columns(i, at, looked_at)].astype(kind)))
            largest.append(peak)
        return tuple(largest)

    def columns(i, at, length):
        begin = i * width + at
        return pl.ds(begin if isinstance(i, int) else pl.multiple_of(begin, LANES), length)

    found = tuple(jnp.zeros((STRIP, looked_at), kind) for _ in strips)
    found = larger(0, found) if turns == 1 else lax.fori_loop(0, turns, larger, found)
    factors = []
    for strip, peak in zip(strips, found, strict=True):
        scale, scales[strip, :] = scales_of(in_lanes(peak), known[0][...] if given else None)
        factors.append(scale if given else 1.0 / scale)  # any may be given, also one whose reciprocal is none

    def store(i):
        for strip, factor in zip(strips, factors, strict=True):
            for at in range(0, width, LANES):
                own = columns(i, at, LANES)
                number = x[strip, own].astype(jnp.float32)
                ratio = jnp.clip(number / factor, LOWEST["int8"], LARGEST["int8"]) if given else number * factor
                values[strip, own] = whole(ratio, values.dtype)

    if turns == 1:
        store(0)
    else:
        pl.loop(0, turns)(store)


def in_lanes(peaks):
    """The largest of each row, [rows LANES] of float32: maxima of its columns, which may be several in a lane."""
    return functools.reduce(
        jnp.maximum, [peaks[:, at : at + LANES].astype(jnp.float32) for at in range(0, peaks.shape[1], LANES)]
    )


def peak_of(x, strip):
    """float32 [STRIP LANES], whose largest number of a row is the peak of that row of x."""
    looked_at = divisor(x.shape[1], LOOKED_AT, LANES)
    peak = jnp.zeros((STRIP, looked_at), x.dtype)
    for at in range(0, x.shape[1], looked_at):
        peak = jnp.maximum(peak, jnp.abs(x[strip, at : at + looked_at]))
    return in_lanes(peak)


def scales_of(peak, given=None):
    """(scales that x is divided by, scales of the sums: NaN where a row is not finite), of peaks in lanes."""
    peak = jnp.max(jnp.where(peak < jnp.inf, peak, jnp.inf), axis=1, keepdims=True)
    peak = jnp.broadcast_to(peak, (peak.shape[0], LANES))
    scale = peak / LARGEST["int8"] if given is None else jnp.broadcast_to(given, peak.shape)
    scale = jnp.where(scale < SMALLEST, 1.0, scale) if given is None else scale
    return scale, jnp.where(peak < jnp.inf, scale, jnp.nan)


def whole(ratio, dtype):
    """float32 ratios within the range of int8, rounded, ties to even, as int8 or bfloat16."""
    if dtype == jnp.int8:
        return lax.bitcast_convert_type(ratio + WHOLE, jnp.int32).astype(dtype)
    return jnp.round(ratio).astype(dtype)
