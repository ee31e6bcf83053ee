"""Row-wise kernels: a block of rows stays in VMEM from the first look at it to the last.

    HBM  x [rows width]  --copy a block-->  VMEM  --strips of rows, a few columns at a time-->  VMEM  --copy-->  HBM

XLA makes a program for each look: one reads all of x for the statistic of a row, the next reads it again
(bench/tpu_rowwise.py shows them).  A kernel answers where x has WORTH bytes, a bound that was chosen, not measured;
below, XLA's programs are as short as one kernel, and fuse with what stands around them.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .. import emulated
from ._chips import current, interpreter
from ._numbers import converted, tile_rows
from ._tiles import lanes

WORTH = 1 << 20
COPIED = 2 << 20  # bytes of a block, all arrays together: copies that long run at the memory's speed
NUMBERS = 4 << 10  # that are looked at together: 4 of 64 vector registers, as float32
UNROLLED = 2  # with more, registers are spilled


@dataclass(frozen=True)
class Plan:
    """Rows of a block and of a strip, and the bytes of VMEM that the blocks take."""

    rows: int
    strip: int
    vmem: int

    def __str__(self):
        return f"blocks of {self.rows} rows in strips of {self.strip}, {self.vmem >> 10} KiB of VMEM"


def pays(x):
    """Whether x is so large that a second look at it costs more than a kernel of its own."""
    return emulated() or math.prod(x.shape) * jnp.dtype(x.dtype).itemsize >= WORTH


def choose(shapes, strip):
    """The Plan for arrays of (shape, dtype) with rows in front."""
    per_row = sum(row_bytes(shape[1:], dtype) for shape, dtype in shapes)
    rows = max(1, shapes[0][0][0])
    block = max(1, min(COPIED // per_row, rows) // strip) * strip
    return Plan(block, strip, 2 * block * per_row)


def row_bytes(tail, dtype):
    """What one row takes of VMEM, where the last axis fills whole lanes."""
    return math.prod(tail[:-1]) * lanes(tail[-1]) * jnp.dtype(dtype).itemsize


def refuse_long(strip, *rows):
    """The refusal of rows, each (tail, dtype), of which a strip does not fit into VMEM."""
    chip, taken = current(), 2 * strip * sum(row_bytes(tail, dtype) for tail, dtype in rows)
    if taken > chip.vmem_limit:
        reason = f"{strip} rows take {taken} bytes of VMEM; {chip.name} has {chip.vmem_limit}"
        yield "SHAPE", reason, "leave it to plain XLA, or cut the rows"


def over_rows(body, given, results, *, name, strip, shared=(), scratch=()):
    """Arrays [rows *tail], one for each of `results`: body(rows of a strip, *refs of given, shared and results).

    Args:
        given: arrays [rows *tail]; a pair (x, part) is half of the columns of x.
        results: (tail, dtype) of each.
        strip: rows that the body works on at once: whole tiles of every dtype.
        shared: arrays that every row sees whole.
        scratch: of a strip, after the results.
    """
    pairs = [x if isinstance(x, tuple) else (x, None) for x in given]
    rows = pairs[0][0].shape[0]
    if rows < strip:
        pairs = [(jnp.pad(x, [(0, strip - rows)] + [(0, 0)] * (x.ndim - 1)), part) for x, part in pairs]
    padded = max(rows, strip)

    def tail(x, part):
        return x.shape[1:] if part is None else (x.shape[1] // 2,)

    shapes = [((padded, *tail(*pair)), pair[0].dtype) for pair in pairs]
    plan = choose([*shapes, *(((padded, *t), dtype) for t, dtype in results)], strip)

    def block(tail, part=None):
        return pl.BlockSpec((plan.rows, *tail), lambda i: (i, *[0] * (len(tail) - 1), part or 0))

    def kernel(*refs):
        @pl.loop(0, plan.rows // strip)
        def _(i):
            body(pl.ds(pl.multiple_of(i * strip, strip), strip), *refs)

    whole = [pl.BlockSpec(x.shape, lambda i, n=x.ndim: (0,) * n) for x in shared]
    answers = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(padded, plan.rows),),
        in_specs=[*(block(tail(*pair), pair[1]) for pair in pairs), *whole],
        out_specs=[block(t) for t, _ in results],
        out_shape=[jax.ShapeDtypeStruct((padded, *t), dtype) for t, dtype in results],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=current().vmem_limit),
        name=name,
        interpret=interpreter() if emulated() else False,
    )(*(x for x, _ in pairs), *shared)
    return [answer[:rows] for answer in answers]


def strip_of(*dtypes):
    """Rows of a strip: whole tiles of every dtype."""
    return max(tile_rows(dtype) for dtype in dtypes)


def chunk_of(strip):
    """Columns that are looked at together."""
    return NUMBERS // strip


def each(width, chunk, do, state=None, costly=False):
    """do(columns, state) for every `chunk` columns of `width`, and for those left over, from left to right.

    costly: it takes more registers than an ordinary one.
    """
    count = width // chunk
    unrolled = min(count, 1 if costly and current().registers < 64 else UNROLLED)

    def several(i, state):
        for j in range(unrolled):
            begin = (i * unrolled + j) * chunk
            state = do(pl.ds(begin if isinstance(i, int) else pl.multiple_of(begin, chunk), chunk), state)
        return state

    if unrolled:
        turns = count // unrolled
        state = several(0, state) if turns == 1 else lax.fori_loop(0, turns, several, state)
    for i in range(count - count % max(unrolled, 1), count):
        state = do(pl.ds(i * chunk, chunk), state)
    return do(pl.ds(count * chunk, width % chunk), state) if width % chunk else state


def over_columns(rows, width, chunk, of, join, reduce, costly=False):
    """[rows 1]: of(columns) [rows columns], at least 0, of all columns joined, then reduced over the lanes."""

    def add(columns, state):
        return join(state, of(columns))

    whole = width // chunk * chunk
    found = None
    if whole:
        lanes = each(whole, chunk, add, jnp.zeros((rows, chunk), jnp.float32), costly)
        found = reduce(lanes, axis=1, keepdims=True)
    if width % chunk:
        rest = reduce(of(pl.ds(whole, width % chunk)), axis=1, keepdims=True)
        found = rest if found is None else join(found, rest)
    return found


def wide(ref, rows, columns):
    """A piece of a ref as float32."""
    return converted(ref[rows, columns], jnp.float32)
