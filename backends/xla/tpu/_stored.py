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
MOVED = 512  # columns of x that are put into order together


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


def factor_dtype(kind, times):
    return jnp.dtype(jnp.float8_e4m3fn) if times else kind.dot


def rows_of_word(dtype):
    """Rows of a factor that lie in a word of 32 bits: in words, a register of it is one store or load."""
    return 4 // dtype.itemsize


def beside_sums(scales, times):
    """The scales of a weight's rows, as a row beside sums that are `times` too large."""
    return (scales * (1 / times) if times else scales)[None, :]


def factors_of(kind, w, scales, zeros, at, step, stored, *, times):
    """(first column, chunk [features CHUNK]) of the stored columns from `at` on, known before, with their scales in.

    Of a packed weight the even ones of 256 columns, then the odd ones: in_stored_order().  In e4m3 they are
    `times` themselves, where that is not 0.
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
    if times:  # 8 less, which flips the highest bit, in the higher half of a byte
        words = pltpu.bitcast(w[:, pl.ds(at, LANES)], jnp.int32) ^ word_of(0x88)
        for i, nibbles in enumerate((words << 4, words)):
            yield 2 * at + i * CHUNK, pltpu.bitcast(nibbles & word_of(0xF0), jnp.int8).astype(jnp.float8_e4m3fn)
        return
    taken = None if zeros is None else _spread(kind, pltpu.bitcast(zeros[...], jnp.int32), at)
    for i, nibbles in enumerate(_halves(w, at)):
        whole = _e2m1(nibbles) if kind.weight == "mxfp4" else _less_words(nibbles, taken)
        yield 2 * at + i * CHUNK, scaled(converted(pltpu.bitcast(whole, jnp.int8), kind.dot))


def _spread(kind, numbers, at):
    """Numbers [rows LANES] of groups as [rows CHUNK]: of each stored column from `at` on; [rows 1] of one group."""
    if not kind.group:
        return numbers
    columns = 2 if kind.weight in PACKED else 1
    group = lax.broadcasted_iota(jnp.int32, numbers.shape, 1) * columns >> (kind.group.bit_length() - 1)
    return lane_taken(numbers, group + at * columns // kind.group)


def in_stored_order(x, interpret):
    """x [rows columns], each 256 columns as a block of a packed weight has them: even ones, then odd ones.

    In words [rows / 2 columns] of two bfloat16, or of as many rows as one holds: so a register is one load.
    """
    rows, columns = x.shape
    each = 4 // x.dtype.itemsize
    height, width = divisor(rows, 256, tile_rows(x.dtype)), divisor(columns, 4096, 2 * LANES)
    specs = [pl.BlockSpec((height // n, width), lambda i, j: (i, j)) for n in (1, each)]
    return pl.pallas_call(
        part_lanes, grid=(rows // height, columns // width), in_specs=specs[:1], out_specs=specs[1],
        out_shape=jax.ShapeDtypeStruct((rows // each, columns), jnp.int32), name="stored_order", interpret=interpret,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
    )(x)  # fmt: skip


def part_lanes(x, y):
    """Whole words move, whatever numbers they hold: of many registers at a time, which share what is set for a move."""
    height, columns = y.shape
    for begins in (range(at, min(at + MOVED, columns), 2 * LANES) for at in range(0, columns, MOVED)):
        pairs = [[x[:, at + i : at + i + LANES] for at in begins] for i in (0, LANES)]
        first, second = (pltpu.bitcast(jnp.concatenate(part, 0), jnp.int32) for part in pairs)
        lane = lax.broadcasted_iota(jnp.int32, first.shape, 1)
        order, half = (lane & (LANES // 2 - 1)) * 2, lane >> 6
        first = lane_taken(first, order + half)  # even columns on the left, odd ones on the right
        second = lane_taken(second, order + 1 - half)  # and the other way round
        even = jnp.where(half == 0, first, second)
        odd = pltpu.roll(jnp.where(half == 0, second, first), LANES // 2, 1)
        for i, at in enumerate(begins):
            y[:, pl.ds(at, LANES)] = even[i * height : (i + 1) * height]
            y[:, pl.ds(at + LANES, LANES)] = odd[i * height : (i + 1) * height]


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
