"""A different low-rank adapter for each row on a TPU: only the adapters that a row names are read.

    rows by adapter    [0 0 0 0 0 | 2 2 | 5]          XLA sorts them, in the program of the kernel
    tiles of 4 rows    [0 0 0 0] [0 . . .] [2 2 . .] [5 . . .]      and as many empty ones as shapes leave possible

    grid (tile, block of features):    h = x aT [tile rank], once a tile;    scale * h bT [tile features]

h keeps its float32: it meets b as two bfloat16 numbers, the second what the first has left.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import emulated
from ._chips import current, interpreter
from ._numbers import carried, converted, multiplied_as, multiply
from ._tiles import lanes, power

ROWS = 16  # of a tile at least
FEATURES = 1024  # of a block
COLUMNS = 256  # multiplied at once; of float32, half as many


def takes(y, x, a, b, adapters, scales):
    """Yield (code, reason, fix) for what the kernel does not take."""
    if 0 in x.shape or 0 in y.shape or 0 in a.shape:
        yield "SHAPE", f"x is {list(x.shape)}, a is {list(a.shape)}; a grid needs a row", "give rows and a rank"
        return
    chip, taken = current(), vmem(x, a, b)
    if taken > chip.vmem_limit:
        yield "SHAPE", f"one adapter takes {taken} bytes of VMEM; {chip.name} has {chip.vmem_limit}", "use a lower rank"


def pays(y, x, a, b, adapters, scales):
    """XLA multiplies each row by every adapter: as good where there is one."""
    return emulated() or a.shape[0] > 1


def run(y, x, a, b, adapters, scales):
    rows, count, features = x.shape[0], a.shape[0], b.shape[1]
    size, block = sizes(x, a, b)
    tiles = max(1, min(rows, rows // size + count))
    named = (adapters >= 0) & (adapters < count)
    adapter = jnp.where(named, adapters, count)
    counts = jnp.zeros(count, jnp.int32).at[adapter].add(1, mode="drop")
    per_adapter = -(-counts // size)
    before, ends = jnp.cumsum(per_adapter) - per_adapter, jnp.cumsum(per_adapter)
    order = jnp.argsort(adapter, stable=True)
    starts = jnp.cumsum(counts) - counts
    rank_of = jnp.zeros(rows, jnp.int32).at[order].set(jnp.arange(rows, dtype=jnp.int32))
    own = jnp.minimum(adapter, count - 1)
    place = jnp.clip(before[own] * size + rank_of - starts[own], 0, tiles * size - 1)
    tile = jnp.arange(tiles, dtype=jnp.int32)
    used = jnp.minimum(jnp.searchsorted(ends, tile, side="right").astype(jnp.int32), count - 1)
    live = jnp.where(tile < ends[-1], jnp.clip(counts[used] - (tile - before[used]) * size, 0, size), 0)
    token = starts[used][:, None] + ((tile - before[used]) * size)[:, None] + jnp.arange(size, dtype=jnp.int32)
    packed = x[order[jnp.clip(token, 0, rows - 1)]].reshape(tiles * size, -1)
    dot = multiplied_as(x.dtype)
    update = pl.pallas_call(
        functools.partial(_kernel, dot),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(tiles, pl.cdiv(features, block)),
            in_specs=[
                pl.BlockSpec((size, x.shape[1]), lambda t, j, *_: (t, 0)),
                pl.BlockSpec((1, *a.shape[1:]), lambda t, j, used, *_: (used[t], 0, 0)),
                pl.BlockSpec((1, block, a.shape[1]), lambda t, j, used, *_: (used[t], j, 0)),
            ],
            out_specs=pl.BlockSpec((size, block), lambda t, j, *_: (t, j)),
            scratch_shapes=[pltpu.VMEM((size, a.shape[1]), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((tiles * size, features), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=current().vmem_limit
        ),
        name="lora_gemm",
        interpret=interpreter() if emulated() else False,
    )(used, live, scales[used].astype(jnp.float32), carried(packed), carried(a), carried(b))
    updated = (y.astype(jnp.float32) + update[place]).astype(y.dtype)
    chosen = jnp.where(named[:, None], _bits(updated), _bits(y))
    return lax.bitcast_convert_type(chosen, y.dtype)


def _kernel(dot, used, live, scales, x, a, b, update, hidden):
    t, j = pl.program_id(0), pl.program_id(1)
    columns = COLUMNS // 2 if dot == jnp.float32 else COLUMNS

    @pl.when(live[t] > 0)
    def _():
        def add(at):
            hidden[...] += multiply(converted(x[:, at], dot), converted(a[0, :, at], dot), transposed=True)

        @pl.when(j == 0)
        def _():
            hidden[...] = jnp.zeros_like(hidden)
            for_pieces(x.shape[1], columns, add)
            hidden[...] *= scales[t]

        def store(at):
            h, other = hidden[...], converted(b[0, at], dot)
            high = h.astype(dot)
            total = multiply(high, other, transposed=True)
            if dot != jnp.float32:
                total += multiply((h - high.astype(jnp.float32)).astype(dot), other, transposed=True)
            update[:, at] = total

        for_pieces(update.shape[1], columns, store)


def for_pieces(size, piece, do):
    """do(slice) for each piece; in a loop, which keeps the registers of one from those of the next."""
    if size % piece:
        do(pl.ds(0, size))
    else:
        pl.loop(0, size // piece)(lambda i: do(pl.ds(pl.multiple_of(i * piece, piece), piece)))


def _bits(x):
    """A selection of bits keeps those of a NaN."""
    return lax.bitcast_convert_type(x, jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16)


def sizes(x, a, b):
    """(rows of a tile, features of a block)."""
    mean = -(-x.shape[0] // a.shape[0])
    return min(max(ROWS, power(mean)), 64), min(FEATURES, lanes(b.shape[1]))


def vmem(x, a, b):
    """Bytes of the blocks, which are double, and of what is multiplied."""
    size, block = sizes(x, a, b)
    numbers = (size + a.shape[1]) * lanes(x.shape[1]) + block * lanes(a.shape[1])
    return 2 * jnp.dtype(x.dtype).itemsize * numbers + 8 * size * block


def plan(y, x, a, b, adapters, scales):
    """What the cost model chose, in words, for `explain`."""
    size, block = sizes(x, a, b)
    return f"tiles of {size} rows of one adapter x {block} features, {vmem(x, a, b) >> 10} KiB of VMEM"
