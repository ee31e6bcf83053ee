"""Weights as they are stored, made into what the matrix unit multiplies: chunks of [features 128 columns] in VMEM.

int4: a byte holds two neighbouring columns, so 128 bytes are two chunks of 128 columns.  Nibbles are parted in 32-bit
words that hold 8 of them, then halves of the lanes change places, and a chunk reads [64 even columns | 64 odd ones];
XLA puts the columns of x into the same order.  Zero points are taken off before the product: q - z is exact.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._numbers import LANES, cleared, converted, tile_rows
from ._tiles import divisor

CHUNK = LANES  # columns that meet in the matrix unit at once, where they share scales
PACKED = ("int4", "mxfp4")


def first_of(kind, at, i):
    """The first column of chunk i of the run of stored columns that begins at `at`."""
    return 2 * at + i * CHUNK if kind.weight in PACKED else at


def chunks_of(kind, w, zeros, at, run, step, stored):
    """[features columns] as multiplied: what meets in the matrix unit of one run."""
    if kind.weight not in PACKED:
        yield _inside(_less(kind, w[:, pl.ds(at, run)], zeros, at), at, step, w.shape[1], stored)
        return
    low, high = _halves(w, at)
    left = lax.broadcasted_iota(jnp.int32, low.shape, 1) < LANES // 2
    pair = (
        jnp.where(left, low, pltpu.roll(high, LANES // 2, 1)),
        jnp.where(left, pltpu.roll(low, LANES // 2, 1), high),
    )
    for i, nibbles in enumerate(pair):
        whole = _e2m1(nibbles) if kind.weight == "mxfp4" else _centred(kind, nibbles, zeros, first_of(kind, at, i))
        yield converted(pltpu.bitcast(whole, jnp.int8), kind.dot)


def factors_of(kind, w, scales, zeros, at, step, stored, factor):
    """(first column, chunk [features CHUNK]) of the stored columns from `at` on, known before, with their scales in.

    Of a packed weight the even ones of 256 columns, then the odd ones: in_stored_order().
    """
    spread = None if scales is None else _spread(kind, scales[...], at)

    def scaled(chunk):
        return chunk if spread is None else (chunk.astype(jnp.float32) * spread).astype(kind.dot)

    if kind.weight not in PACKED:
        chunk = converted(w[:, pl.ds(at, CHUNK)], jnp.float32 if spread is not None or zeros is not None else kind.dot)
        if zeros is not None:
            chunk = (chunk - _spread(kind, zeros[...], at)).astype(kind.dot)
        yield at, _inside(scaled(chunk), at, step, w.shape[1], stored)
        return
    if kind.weight == "int4" and zeros is None and factor.itemsize == 1:
        words = pltpu.bitcast(w[:, pl.ds(at, LANES)], jnp.int32) ^ word_of(0x88)
        for i, nibbles in enumerate(((words << 4), words)):
            yield 2 * at + i * CHUNK, converted(pltpu.bitcast(nibbles & word_of(0xF0), jnp.int8), factor)
        return
    taken = None if zeros is None else _spread(kind, pltpu.bitcast(zeros[...], jnp.int32), at)
    for i, nibbles in enumerate(_halves(w, at)):
        whole = _e2m1(nibbles) if kind.weight == "mxfp4" else _less_words(nibbles, taken)
        yield 2 * at + i * CHUNK, scaled(converted(pltpu.bitcast(whole, jnp.int8), factor))


def _spread(kind, numbers, at):
    """Numbers [rows LANES] of groups as [rows CHUNK]: of each stored column from `at` on; [rows 1] of one group."""
    if not kind.group:
        return numbers
    columns = 2 if kind.weight in PACKED else 1
    group = lax.broadcasted_iota(jnp.int32, numbers.shape, 1) * columns >> (kind.group.bit_length() - 1)
    return lane_taken(numbers, group + at * columns // kind.group)


def in_stored_order(x, interpret):
    """x [rows columns], each 256 columns as a block of a packed weight has them: even ones, then odd ones."""
    rows, columns = x.shape
    height, width = divisor(rows, 128, tile_rows(x.dtype)), divisor(columns, 4096, 2 * LANES)
    words = 4 // x.dtype.itemsize
    specs = [pl.BlockSpec((height // n, width), lambda i, j: (i, j)) for n in (1, words)]
    return pl.pallas_call(
        _part_lanes, grid=(rows // height, columns // width), in_specs=specs[:1], out_specs=specs[1],
        out_shape=jax.ShapeDtypeStruct((rows // words, columns), jnp.int32), name="stored_order", interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    )(x)  # fmt: skip


def _part_lanes(x, y):
    """Whole words move, whatever numbers they hold."""
    height = divisor(x.shape[0], 4 * tile_rows(x.dtype), tile_rows(x.dtype))

    @pl.loop(0, x.shape[0] // height)
    def _(i):
        own = pl.ds(pl.multiple_of(i * height, height), height)
        wide = height * x.dtype.itemsize // 4
        words_own = pl.ds(pl.multiple_of(i * wide, wide), wide)
        for at in range(0, x.shape[1], 2 * LANES):
            first, second = (pltpu.bitcast(x[own, at + i : at + i + LANES], jnp.int32) for i in (0, LANES))
            lane = lax.broadcasted_iota(jnp.int32, first.shape, 1)
            even, order = (lane & 1) == 0, (lane & (LANES // 2 - 1)) * 2 + (lane >> 6)
            mixed = (
                jnp.where(even, first, pltpu.roll(second, 1, 1)),  # the second's even ones beside the first's
                jnp.where(even, pltpu.roll(first, LANES - 1, 1), second),
            )
            for i, words in enumerate(mixed):
                y[words_own, pl.ds(at + i * LANES, LANES)] = lane_taken(words, order)


def lane_taken(words, lane):
    """[rows LANES]: from which lane of its row each comes."""
    return jnp.take_along_axis(words, lane, axis=1, mode="promise_in_bounds")


def _halves(w, at):
    """Low nibbles, then high ones, of 128 stored columns, in words of four rows."""
    words = pltpu.bitcast(w[:, pl.ds(at, LANES)], jnp.int32)
    return words & word_of(0x0F), lax.shift_right_logical(words, 4) & word_of(0x0F)


def word_of(byte):
    """The byte in each quarter of an int32."""
    return jnp.int32(int.from_bytes(bytes([byte] * 4), "little", signed=True))


def _centred(kind, nibbles, zeros, at):
    return _less_words(nibbles, None if zeros is None else _of_groups(kind, pltpu.bitcast(zeros[...], jnp.int32), at))


def _less_words(nibbles, taken):
    """In each byte a nibble less its zero point z: 128 - z more carries into no other byte, and flips the sign bit."""
    return (nibbles + (word_of(0x80) - (word_of(0x08) if taken is None else taken))) ^ word_of(0x80)


def _e2m1(codes):
    """In each byte twice the number of a code, which is whole: 0 1 2 3 4 6 8 12, with the sign that bit 3 says.

    2 s - 4 for sizes s of 4 and 5 is s + (s & 3); 6 and 7 want that too, and 7 two more.
    """
    size, fours = codes & word_of(0x07), codes & word_of(0x04)
    seven = (size & lax.shift_right_logical(size, 1) & lax.shift_right_logical(size, 2)) & word_of(0x01)
    twice = size + (size & (fours - lax.shift_right_logical(fours, 2))) + (seven << 1)
    sign = codes & word_of(0x08)
    negative = (sign << 1) - lax.shift_right_logical(sign, 3)  # 15 where it is
    return ((twice | word_of(0x80)) - ((twice & negative) << 1)) ^ word_of(0x80)


def _inside(chunk, at, step, width, stored):
    """`chunk` with zeros in columns past the last; integers there are finite, and x is zero."""
    if stored % width == 0 or jnp.issubdtype(chunk.dtype, jnp.integer):
        return chunk
    column = step * width + at + lax.broadcasted_iota(jnp.int32, chunk.shape, 1)
    return cleared(chunk, column < stored)


def _less(kind, chunk, zeros, at):
    """A chunk of stored numbers, from column `at` on, less the zero points of its groups; as multiplied."""
    if zeros is None:
        return converted(chunk, kind.dot)
    taken = _of_groups(kind, zeros[...], at)
    return (chunk.astype(jnp.float32) - taken).astype(kind.dot)


def _of_groups(kind, numbers, at):
    """Numbers [rows groups] of each row's groups as [rows CHUNK], or [rows 1] of one: for columns from `at` on."""
    if not kind.group:
        return numbers
    group, shift, within = group_of(kind, at), kind.group.bit_length() - 1, CHUNK // kind.group
    taken = column(numbers, group)
    lane = stored_lane(kind, (numbers.shape[0], CHUNK)) >> shift
    for i in range(1, within):
        taken = jnp.where(lane == i, column(numbers, group + i), taken)
    return taken


def group_of(kind, at):
    """Of a traced number, // asks which TPU this is; an export has none."""
    return at // kind.group if isinstance(at, int) else lax.div(at, kind.group)


def stored_lane(kind, shape):
    """Which of 128 columns each lane holds: of a packed weight the even ones are on the left, odd ones on the right."""
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    return (lane & (CHUNK // 2 - 1)) * 2 if kind.weight in ("int4", "mxfp4") else lane


def column(numbers, index):
    """[rows 1]: one column, by a sum over lanes, since which one is not known before."""
    lane = lax.broadcasted_iota(jnp.int32, numbers.shape, 1)
    return jnp.sum(jnp.where(lane == index, numbers, jnp.zeros_like(numbers)), axis=1, keepdims=True)
