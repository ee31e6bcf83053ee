"""Few rows by int4 weights without zero points, where unpacking bounds a core: a weight is multiplied only once.

A byte of the weight holds two neighbouring columns, so 128 bytes of a feature are its even columns of 256, then its odd
ones.  A first kernel puts x into that order, once.  What a nibble n = 0 .. 15 becomes, by the chip:

    16 + n in bfloat16, as bits: the nibble shifted to the top of the mantissa of 16.  Of the four features in a 32-bit
        word, the first and third come together, then the second and fourth: features lie as even ones, odd ones of 128.
    n in bfloat16, by the one instruction that v6e has for bytes.  A high nibble stays in its place, 16 n, and x there
        is divided by 16: both exact.
    n in bfloat16, by the one that v6e has for uint4, where a scale serves a row: of a feature's bytes the low nibbles
        are a row, the high ones the next.  x is stacked too, even columns on odd ones, and the sums of a feature are
        those of even columns in one lane and those of odd ones in the next.
    n / 512 in e4m3, as bits, for the matrix unit of v7x, which multiplies bfloat16 by e4m3: the smallest exponent and
        the subnormal numbers below it count in steps of 1 / 512.  The matrix unit takes them as it takes FP8 weights.

The weight is n - 8, so the sums are less those of x by what stands for 8.  They go through the same matrix unit in the
same order: of a feature whose weights are all 0 the two are equal.  The groups of 256 columns meet it at once: x is
stacked, one copy for each group, zero in the others' columns.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._numbers import LANES, multiply
from ._product import FEW, activated
from ._stored import lane_taken, word_of
from ._tiles import divisor, power

PAIR = 2 * LANES  # columns in 128 bytes
LEAST = 16  # rows of a factor of bfloat16
KEPT = 8  # rows whose sums stay in registers through a block
TALLEST = 128  # rows of stacked x
EIGHT, SIXTEEN = 8.0, 16.0
E4M3, NIBBLE = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.uint4)
STEPS = 512.0  # of e4m3 in 1, where its codes are 0 .. 15
RUNS = {E4M3: 512, NIBBLE: 1024}  # columns summed at once where all share a scale: with more, bundles fill less


@dataclass(frozen=True)
class Blocks:
    """Sizes of one grid step.

    Args:
        m: rows, all of them.
        n, k: features and columns of a block.
        width: features that are multiplied at once.
        pieces: of those, how many stand one after the other in the program: between them its bundles fill.
        run: columns that are multiplied at once.
        stack: copies of x, one for each group of PAIR columns.
        byte_to: what bytes become; None where nibbles are put into bfloat16 as bits; uint4 where they are rows.
        vmem: bytes that the cost model expects.
    """

    m: int
    n: int
    k: int
    width: int
    pieces: int
    run: int
    stack: int
    byte_to: jnp.dtype | None
    vmem: int
    vmem_limit: int

    @property
    def zeros(self):
        """What the weight 0 is multiplied as, in even and odd columns."""
        if self.byte_to is None:
            return (EIGHT + SIXTEEN,) * 2
        return (EIGHT / STEPS,) * 2 if self.byte_to == E4M3 else (EIGHT, self.odd * EIGHT)

    @property
    def apart(self):
        """Whether even columns and odd ones are summed apart: x [m k] lies as words of two of its 2 m rows of k / 2."""
        return self.byte_to == NIBBLE

    @property
    def odd(self):
        """How many times itself a nibble of an odd column is."""
        return SIXTEEN if self.byte_to == jnp.bfloat16 else 1.0

    @property
    def steps(self):
        """How many times the sums the product is."""
        return STEPS if self.byte_to == E4M3 else 1.0


def takes(chip, kind, rows, zeros):
    """Whether this kernel has the call."""
    suits = kind.weight == "int4" and kind.dot == jnp.bfloat16 and not kind.apart and not zeros
    return suits and rows <= FEW and _stack_of(kind) * rows <= TALLEST and chip.registers >= 64


def choose(chip, *, rows, features, columns, kind):
    """Large blocks: each begins and ends with bundles that wait.  All columns, where they fit, and then features."""
    m = -(-rows // 8) * 8
    stack = _stack_of(kind)
    byte_to = NIBBLE if chip.byte_to == jnp.bfloat16 and not kind.group and m <= KEPT else chip.byte_to
    width = PAIR if m <= KEPT and chip.fp8 else LANES
    pieces = 1 if m > KEPT else 8 if byte_to == NIBBLE and kind.parts == 1 else 4 // kind.parts
    n = max(LANES, min(power(features), 1024 // kind.parts))
    width = min(width, n)
    k = min(power(max(columns, PAIR)), 4096)

    def vmem(k):
        x = stack * m * (2 * k + 4 * k // 2)
        return 2 * (x + kind.parts * n * (k // 2 + 8 * max(1, k // (kind.group or k)))) + (4 * kind.parts + 4) * m * n

    while k > 8 * PAIR and vmem(k) > chip.vmem_limit * 2 // 3:
        k //= 2
    run = PAIR if kind.group else min(k, RUNS[byte_to]) if byte_to in RUNS else k
    return Blocks(m, n, k, width, min(pieces, n // width), run, stack, byte_to, vmem(k), chip.vmem_limit)


def _stack_of(kind):
    return PAIR // kind.group if kind.group else 1


def product(x, values, scales, *, kind, blocks, row_scale=None, bias=None, out_dtype, interpret=False):
    """y [M N] in out_dtype; of a gated weight [M N / 2].

    Args:
        x: bfloat16 [M K].
        values: uint8 [N K / 2].
        scales: float32 [N groups]; [N 1] where a scale serves a row.
        row_scale: float32 [M], what a row of the sum is multiplied by.
    """
    rows, features = x.shape[0], values.shape[0] // kind.parts
    m, n, k, stack = blocks.m, blocks.n, blocks.k, blocks.stack
    steps = -(-kind.columns // k)
    x = jnp.pad(x, ((0, m - rows), (0, steps * k - x.shape[1])))
    tall, held = ((m, k // 2), jnp.int32) if blocks.apart else ((stack * m, k), x.dtype)
    offsets = LANES if blocks.apart else k // blocks.run * LANES  # columns of a step
    x, less = pl.pallas_call(
        functools.partial(_apart if blocks.apart else _stack, kind, blocks),
        grid=(steps,),
        in_specs=[pl.BlockSpec((m, k), lambda i: (0, i))],
        out_specs=[pl.BlockSpec(tall, lambda i: (0, i)), pl.BlockSpec((stack * m, offsets), lambda i: (0, i))],
        out_shape=[
            jax.ShapeDtypeStruct((tall[0], steps * tall[1]), held),
            jax.ShapeDtypeStruct((stack * m, steps * offsets), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=blocks.vmem_limit),
        name="stacked_rows",
        interpret=interpret,
    )(x)
    per_step = k // kind.group if kind.group else 1
    groups = per_step * steps if kind.group else 1
    scales = jnp.pad(scales.T, ((0, groups - scales.shape[1]), (0, 0))).reshape(groups, kind.parts, features)
    operands = [x, less, values.reshape(kind.parts, features, -1), jnp.swapaxes(scales, 0, 1)]
    specs = [
        pl.BlockSpec(tall, lambda j, s: (0, s)),
        pl.BlockSpec((stack * m, offsets), lambda j, s: (0, s)),
        pl.BlockSpec((kind.parts, n, k // 2), lambda j, s: (0, j, s)),
        pl.BlockSpec((kind.parts, per_step, n), lambda j, s: (0, s if kind.group else 0, j)),
    ]
    if row_scale is not None:
        operands.append(jnp.pad(row_scale.reshape(rows, 1), ((0, m - rows), (0, 0))))
        specs.append(pl.BlockSpec((m, 1), lambda j, s: (0, 0)))
    if bias is not None:
        operands.append(bias.astype(jnp.float32).reshape(kind.parts, features))
        specs.append(pl.BlockSpec((kind.parts, n), lambda j, s: (0, j)))
    ordered = [pltpu.VMEM((kind.parts, n // LANES, per_step, LANES), jnp.float32)] if kind.group else []
    y = pl.pallas_call(
        functools.partial(_kernel, kind, blocks, (row_scale is not None, bias is not None), steps),
        grid=(-(-features // n), steps),
        in_specs=specs,
        out_specs=pl.BlockSpec((m, n), lambda j, s: (0, j)),
        out_shape=jax.ShapeDtypeStruct((m, features), out_dtype),
        scratch_shapes=[pltpu.VMEM((kind.parts, m, n), jnp.float32), *ordered],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem_limit
        ),
        name="product_nibbles",
        interpret=interpret,
    )(*operands)
    return y[:rows]


def _stack(kind, blocks, x, tall, less):
    """x [m k] as tall [stack m, k], and less [stack m, 128 of each run]: what the sums of those columns are less by."""
    shape = (blocks.m, LANES)
    lane = lax.broadcasted_iota(jnp.int32, shape, 1)
    left, even = lane < LANES // 2, (lane & (LANES // 2 - 1)) * 2
    group = even + PAIR // 2 * (lane >> 6) >> kind.group.bit_length() - 1 if kind.group else lane * 0
    zero = jnp.concatenate([jnp.full((LANES, LANES), z, x.dtype) for z in blocks.zeros], 1)

    def pair(i):
        columns = pl.multiple_of(i * PAIR, PAIR)
        halves = [x[:, pl.ds(columns + at, LANES)].astype(jnp.float32) for at in (0, LANES)]
        ordered = []
        for odd in range(2):
            first, second = (lane_taken(half, even + odd) for half in halves)
            one = jnp.where(left, first, second)
            one = one / blocks.odd if odd and blocks.odd != 1 else one
            copies = [one if blocks.stack == 1 else jnp.where(group == g, one, 0.0) for g in range(blocks.stack)]
            ordered.append(jnp.concatenate(copies, 0).astype(x.dtype))
        both = jnp.concatenate(ordered, 1)
        tall[:, pl.ds(columns, PAIR)] = both
        if blocks.run == PAIR:
            less[:, pl.ds(pl.multiple_of(i * LANES, LANES), LANES)] = multiply(both, zero, transposed=True)

    pairs = x.shape[1] // PAIR
    together = divisor(pairs, max(1, TALLEST // (blocks.stack * blocks.m)), 1)

    @pl.loop(0, pairs // together)
    def _(i):
        for at in range(together):
            pair(i * together + at)

    if blocks.run > PAIR:
        wide = jnp.concatenate([zero] * (blocks.run // PAIR), 1)
        for i in range(x.shape[1] // blocks.run):
            own = tall[:, pl.ds(i * blocks.run, blocks.run)]
            less[:, pl.ds(i * LANES, LANES)] = multiply(own, wide, transposed=True)


def _apart(kind, blocks, x, words, less):
    """x [m k] as bfloat16 [2 m, k / 2], even columns above odd ones, in words [m, k / 2]; less [m, 128] of them all."""
    half = blocks.m // 2
    lane = lax.broadcasted_iota(jnp.int32, (blocks.m, LANES), 1)
    left, even = lane[:half] < LANES // 2, (lane & (LANES // 2 - 1)) * 2
    for at in range(0, x.shape[1], PAIR):
        both = jnp.concatenate([pltpu.bitcast(x[:, at + i : at + i + LANES], jnp.int32) for i in (0, LANES)], 0)
        taken = [lane_taken(both, even + odd) for odd in range(2)]
        ordered = [jnp.where(left, one[:half], one[half:]) for one in taken]
        words[:, at // 2 : at // 2 + LANES] = jnp.concatenate(ordered, 0)
    sums = _multiply_apart(blocks, words, jnp.full((LEAST, words.shape[1]), EIGHT, x.dtype))[:, :1]
    less[...] = jnp.broadcast_to(sums[: blocks.m] + sums[blocks.m :], less.shape)


def _multiply_apart(blocks, x, factor):
    """x in words [m, k / 2] times factor [rows, k / 2]: [2 m, rows].  Runs that are added up last fill more bundles."""
    runs = (slice(at, at + blocks.run // 2) for at in range(0, x.shape[1], blocks.run // 2))
    sums = [multiply(pltpu.bitcast(x[:, own], factor.dtype), factor[:, own], transposed=True) for own in runs]
    return functools.reduce(jnp.add, sums)


def _kernel(kind, blocks, there, steps, x, less, w, scales, *refs):
    """One block.  x [stack m, BK], less [stack m, 128 a run], w [parts BN BK / 2], scales [parts groups BN] ...

    Where columns are apart, x is words [m, BK / 2].
    """
    held = list(refs)
    row_scale, bias = (held.pop(0) if given else None for given in there)
    y, acc, *ordered = held
    step, width, m, n = pl.program_id(1), blocks.width, blocks.m, blocks.n
    columns = 2 * w.shape[2]
    bits = blocks.byte_to is None
    whole = steps == kind.parts == 1 and m <= KEPT and not (bits and kind.group)  # no later sums are added

    if not whole:

        @pl.when(step == 0)
        def _():
            acc[...] = jnp.zeros_like(acc)

    for part in range(kind.parts if kind.group else 0):  # a row of 128 lanes is loaded into all sublanes at once
        for f in range(n // LANES):
            own = scales[part, :, f * LANES : (f + 1) * LANES]
            ordered[0][part, f] = _parted(own) if bits else own * blocks.steps

    def spread(part, own, group):
        """The scales of a group [1 width], in the order of the sums."""
        first = own.start // LANES if isinstance(own.start, int) else lax.div(own.start, LANES)
        return jnp.concatenate([ordered[0][part, first + i, pl.ds(group, 1)] for i in range(width // LANES)], 1)

    def multiply_apart(part, own):
        sums = _multiply_apart(blocks, x, pltpu.bitcast(w[part, own], NIBBLE).astype(jnp.bfloat16))
        return _summed(sums) - jnp.concatenate([less[...]] * (width // LANES), 1)

    def multiply_piece(part, own):
        total = None
        for at in range(0, columns, blocks.run):
            pairs = range(at, at + blocks.run, PAIR)
            factor = [_factor(w[part, own, pl.ds(i // 2, LANES)], blocks.byte_to) for i in pairs]
            sums = multiply(x[:, pl.ds(at, blocks.run)], jnp.concatenate(factor, 1), transposed=True)
            sums -= jnp.concatenate([less[:, pl.ds(at // blocks.run * LANES, LANES)]] * (width // LANES), 1)
            if kind.group:
                taken = (
                    sums[i * m : (i + 1) * m] * spread(part, own, at // kind.group + i) for i in range(blocks.stack)
                )
                sums = functools.reduce(jnp.add, taken)
            if m > KEPT:
                acc[part, :, own] += sums
            else:
                total = sums if total is None else total + sums
        return total

    def multiply_pieces(i):
        for piece in range(blocks.pieces):
            begin = (i * blocks.pieces + piece) * width
            own = pl.ds(begin if isinstance(begin, int) else pl.multiple_of(begin, width), width)
            for part in range(kind.parts):
                sums = multiply_apart(part, own) if blocks.apart else multiply_piece(part, own)
                if whole:
                    finish(own, [sums])
                elif m <= KEPT:
                    acc[part, :, own] += sums

    def finish(own, sums):
        """What the sums of some features are of the answer."""
        for f in range(own.size // LANES):
            z, lanes = [], pl.ds(own.start + f * LANES, LANES)
            for part in range(kind.parts):
                value = sums[part][:, f * LANES : (f + 1) * LANES]
                value = _joined(value) if bits else value
                value = value if kind.group else value * (scales[part, :, lanes] * blocks.steps)
                value = value if row_scale is None else value * row_scale[...]
                z.append(value if bias is None else value + bias[part, lanes][None, :])
            y[:, lanes] = activated(z, kind.activation).astype(y.dtype)

    turns = n // width // blocks.pieces
    if turns == 1:
        multiply_pieces(0)
    else:
        pl.loop(0, turns)(multiply_pieces)

    if not whole:

        @pl.when(step == steps - 1)
        def _():
            for f in range(n // LANES):
                own = pl.ds(f * LANES, LANES)
                finish(own, [acc[part, :, own] for part in range(kind.parts)])


def _factor(stored, byte_to):
    """Bytes [features LANES] as what is multiplied, [features PAIR]: even columns, odd columns."""
    words = pltpu.bitcast(stored, jnp.int32)
    if byte_to == E4M3:
        halves = words & word_of(0x0F), lax.shift_right_logical(words, 4) & word_of(0x0F)
        return jnp.concatenate([pltpu.bitcast(half, byte_to) for half in halves], 1)
    if byte_to is not None:
        halves = (words & word_of(0x0F), words & word_of(0xF0))  # the high ones 16 times: x there is less by 16
        return jnp.concatenate([pltpu.bitcast(half, jnp.uint8).astype(byte_to) for half in halves], 1)

    def taken(shifted):
        return pltpu.bitcast((shifted & jnp.int32(0x00780078)) | jnp.int32(0x41804180), jnp.bfloat16)

    low = taken(words << 3), taken(lax.shift_right_logical(words, 5))
    high = taken(lax.shift_right_logical(words, 1)), taken(lax.shift_right_logical(words, 9))
    parted = [jnp.concatenate(pair, 1) for pair in zip(low, high, strict=True)]  # even features, odd features
    half = LANES // 2
    return jnp.concatenate([p[at : at + half] for at in range(0, parted[0].shape[0], half) for p in parted], 0)


def _summed(sums):
    """Of even columns [m, 2 features] above those of odd ones, of which each wants every second lane: [m, features]."""
    m = sums.shape[0] // 2
    even = lax.broadcasted_iota(jnp.int32, (m, LANES), 1) & 1 == 0

    def features(at):
        halves = (jnp.where(even, sums[:m, i : i + LANES], sums[m:, i : i + LANES]) for i in (at, at + LANES))
        whole = (half + pltpu.roll(half, by, 1) for half, by in zip(halves, (LANES - 1, 1), strict=True))
        return _parted(jnp.where(even, *whole))  # 64 of them in the even lanes, the next 64 in the odd ones

    return jnp.concatenate([features(at) for at in range(0, sums.shape[1], PAIR)], 1)


def _parted(row):
    """[rows LANES] with the even lanes first, then the odd ones."""
    lane = lax.broadcasted_iota(jnp.int32, row.shape, 1)
    return lane_taken(row, (lane & (LANES // 2 - 1)) * 2 + (lane >> 6))


def _joined(row):
    """What _parted parted."""
    lane = lax.broadcasted_iota(jnp.int32, row.shape, 1)
    return lane_taken(row, (lane & 1) * (LANES // 2) + (lane >> 1))
