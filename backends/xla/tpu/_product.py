"""act(row_scale * (x @ dequantize(weight)T) + bias) in one Pallas kernel, for dense and every quantized weight.

    x [M K] bf16, f32, int8 or e4m3        w [N K], as QuantizedWeight stores it: no second copy of the weight
        +------+------+                        +------+------+
    BM  |      |      | ->  k                  |      |      | BN        grid (M / BM, N / BN, K / BK), k innermost
        +------+------+                        +------+------+
           BK                                     BK

Within a block, 128 columns at a time meet in the matrix unit, and their float32 sum is multiplied by the scales of
their group: [groups N] lies so that a group is one row over the lanes.  So weights stay exact in bfloat16.
A group of 32 or 64 columns is 128 columns of which x keeps those of the group: its rows are stacked, one copy a group.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import _stored
from ._activations import activated
from ._numbers import LANES, SUBLANES, cleared, multiply, tile_rows
from ._pieces import after, for_pieces, in_turns
from ._stored import CHUNK, PACKED, chunks_of, column, factors_of, first_of, group_of, in_stored_order, stored_lane
from ._tiles import divisor, lanes, power

FEW = 64  # rows: beyond, the weight is unpacked once for pieces of them
LONGEST = 512  # columns of a run
HEIGHT = 128  # rows of a piece
EPILOGUE_ROWS = 32  # at a time
UNPACKED = 64  # features at a time
HIGH = 16  # times itself, a nibble in the higher half of a byte


@dataclass(frozen=True)
class Blocks:
    """Sizes of one grid step, and the bytes of VMEM that the cost model expects.

    Args:
        m, n, k: rows, features and columns of a block.
        height, width: rows and features that are multiplied at once, so that registers hold what is live.
        run: columns, as stored, that they are multiplied by.
        stacks: whether x, cleared for each group of a chunk, is one tall factor.
        unpacked: features that are made into what is multiplied at a time, before they are; 0 where all in one go.
        whole: whether a block is made into what is multiplied, with the scales of its groups, before any of it is.
        turn: of such a block, features that are multiplied in one piece of program, so that their bundles fill.
        early: whether of such a turn what is multiplied is made there too, or of the whole block before.
        finishes: whether the last sums of such a block are scaled by rows, and stored, as they come.
        times: how many times itself an int4 weight is in e4m3; 0 where it is made into what x is.
    """

    m: int
    n: int
    k: int
    height: int
    width: int
    run: int
    stacks: bool
    unpacked: int
    whole: bool
    turn: int
    early: bool
    finishes: bool
    times: int
    vmem: int
    vmem_limit: int


@dataclass(frozen=True)
class Kind:
    """What the kernel must know of a call.

    Args:
        weight: 'dense', 'int4', 'int8', 'fp8' or 'mxfp4'.
        dot: what is multiplied.
        group: columns that share a scale; 0: all columns of a row.
        parts: 2 of a gated weight, the gate and what it gates.
        columns: of the dense weight.
        apart: whether groups are summed apart, since x has scales of its own or is integers.
    """

    weight: str
    dot: jnp.dtype
    group: int
    activation: str
    parts: int
    columns: int
    apart: bool


def product(
    x, values, scales, zeros=None, *, kind: Kind, blocks: Blocks, x_scales=None, row_scale=None, bias=None, out_dtype,
    interpret=False,
):  # fmt: skip
    """y [M N] in out_dtype; of a gated weight [M N / 2].

    Args:
        x: [M K], columns in the order of the stored weight, in kind.dot or int8 or e4m3.
        values: [N K] or, packed, [N K / 2]; float16 as uint16.
        scales: float32 [N groups]; [N 1] where a scale serves a row; None for a dense weight.
        zeros: [N groups], of int4 uint8, else float32.
        x_scales: float32 [M groups], of x rounded in groups.
        row_scale: float32 [M], of whole blocks also [M LANES]: what the sums of a row are multiplied by.
    """
    rows, features = x.shape[0], values.shape[0] // kind.parts
    m, n, k = blocks.m, blocks.n, blocks.k
    padded_rows, steps = -(-rows // m) * m, -(-kind.columns // k)
    packed = kind.weight in PACKED
    x = jnp.pad(x, ((0, padded_rows - rows), (0, steps * k - x.shape[1])))
    if packed and blocks.whole:
        x = in_stored_order(x, interpret)
    elif packed:
        x = x.reshape(padded_rows, -1, CHUNK // 2, 2).swapaxes(2, 3).reshape(x.shape)
    operands = [x, values.reshape(kind.parts, features, -1)]
    specs = [
        pl.BlockSpec((m * x.shape[0] // padded_rows, k), lambda i, j, s: (i, s)),
        pl.BlockSpec((kind.parts, n, k // 2 if packed else k), lambda i, j, s: (0, j, s)),
    ]
    per_step = k // kind.group if kind.group else 1
    groups = per_step * steps if kind.group else 1

    def beside_rows(numbers):
        """[features groups] -> [steps parts features groups of a step]: as the rows of the weight."""
        numbers = jnp.pad(numbers, ((0, 0), (0, groups - numbers.shape[1]))).reshape(kind.parts, features, -1, per_step)
        wide = lanes(per_step) if blocks.whole and kind.group else per_step
        operands.append(jnp.pad(jnp.moveaxis(numbers, 2, 0), ((0, 0), (0, 0), (0, 0), (0, wide - per_step))))
        specs.append(pl.BlockSpec((1, kind.parts, n, wide), lambda i, j, s: (s if kind.group else 0, 0, j, 0)))

    if scales is not None and blocks.whole and kind.group:
        beside_rows(scales)
    elif scales is not None:  # [steps groups parts features]: a group is a row over the lanes
        scales = jnp.pad(scales.T, ((0, groups - scales.shape[1]), (0, 0)))
        operands.append(scales.reshape(-1, per_step, kind.parts, features))
        specs.append(pl.BlockSpec((1, per_step, kind.parts, n), lambda i, j, s: (s if kind.group else 0, 0, 0, j)))
    if zeros is not None:
        beside_rows(zeros)
    if x_scales is not None:
        width = lanes(x_scales.shape[1])
        operands.append(jnp.pad(x_scales, ((0, padded_rows - rows), (0, width - x_scales.shape[1]))))
        specs.append(pl.BlockSpec((m, width), lambda i, j, s: (i, 0)))
    if row_scale is not None:
        wide = LANES if blocks.whole else 1
        row_scale = jnp.broadcast_to(row_scale.reshape(rows, -1), (rows, wide))
        operands.append(jnp.pad(row_scale, ((0, padded_rows - rows), (0, 0))))
        specs.append(pl.BlockSpec((m, wide), lambda i, j, s: (i, 0)))
    if bias is not None:
        operands.append(bias.astype(jnp.float32).reshape(kind.parts, features))
        specs.append(pl.BlockSpec((kind.parts, n), lambda i, j, s: (0, j)))
    there = [given is not None for given in (scales, zeros, x_scales, row_scale, bias)]
    stored = -(-kind.columns // 2) if packed else kind.columns
    direct = values.dtype == kind.dot and zeros is None and (stored % k == 0 or jnp.issubdtype(kind.dot, jnp.integer))
    scratch = [pltpu.VMEM((kind.parts, m, n), _sum_dtype(kind))]
    if blocks.whole:
        made = (blocks.turn if blocks.early else n) // _stored.rows_of_word(_stored.factor_dtype(kind, blocks.times))
        scratch += [] if direct else [pltpu.VMEM((made, k), jnp.int32)]
    elif blocks.unpacked and not direct:
        scratch.append(pltpu.VMEM((2 if packed else 1, n, blocks.run), kind.dot))
    y = pl.pallas_call(
        functools.partial(_kernel, kind, blocks, there, stored, steps),
        grid=(padded_rows // m, -(-features // n), steps),
        in_specs=specs,
        out_specs=pl.BlockSpec((m, n), lambda i, j, s: (i, j)),
        out_shape=jax.ShapeDtypeStruct((padded_rows, features), out_dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem_limit
        ),
        name=f"product_{kind.weight}",
        interpret=interpret,
    )(*operands)
    return y[:rows]


def _sum_dtype(kind):
    return jnp.int32 if kind.dot == jnp.int8 and not kind.group else jnp.float32


def _kernel(kind, blocks, there, stored, steps, x, w, *refs):
    """One block.  x [BM BK], w [parts BN BK], scales [1 groups parts BN], zeros [1 parts BN groups] ..."""
    held = list(refs)
    scales, zeros, x_scales, row_scale, bias = (held.pop(0) if given else None for given in there)
    y, acc, *unpacked = held
    kept = [unpacked[0].at[i] for i in range(unpacked[0].shape[0])] if unpacked and not blocks.whole else []
    step = pl.program_id(2)
    rows, features, width, run = y.shape[0], w.shape[1], w.shape[2], blocks.run

    alone = blocks.whole and steps == 1  # the first run's sums are stored as they are
    packing = 2 if kind.weight in PACKED else 1

    if not alone:

        @pl.when(step == 0)
        def _():
            acc[...] = jnp.zeros_like(acc)

    finishes = alone and kind.parts == 1 and (blocks.finishes or row_scale is None)

    def finish(own, sums):
        value = sums.astype(jnp.float32)
        if scales is not None and not kind.group:
            value *= _stored.beside_sums(scales[0, 0, 0, own], blocks.times)
        if row_scale is not None:
            value *= jnp.concatenate([row_scale[...]] * (value.shape[1] // LANES), 1)
        if bias is not None:
            value += bias[0, own][None, :]
        y[:, own] = activated([value], kind.activation).astype(y.dtype)

    def multiply_whole(part):
        """All columns of the block.  A weight that is not multiplied as it is stored is made into that on the way."""
        turn, runs = blocks.turn, range(0, x.shape[1], run)
        grouped = scales if kind.group else None

        def make(begin, place, at, length):
            own = pl.ds(begin, blocks.unpacked)
            taken, less = (None if numbers is None else numbers.at[0, part, own] for numbers in (grouped, zeros))
            for stored_column in range(at // packing, (at + length) // packing, CHUNK):
                chunks = factors_of(kind, w.at[part, own], taken, less, stored_column, step, stored, times=blocks.times)
                for into, chunk in chunks:
                    unpacked[0][made(place, blocks.unpacked), into : into + CHUNK] = pltpu.bitcast(chunk, jnp.int32)

        def made(first, length):
            each = _stored.rows_of_word(_stored.factor_dtype(kind, blocks.times))
            first = first // each if isinstance(first, int) else pl.multiple_of(lax.div(first, each), length // each)
            return pl.ds(first, length // each)

        def multiply_piece(begin, place, at):
            own, columns = pl.ds(begin, blocks.width), pl.ds(at, run)
            if unpacked:
                factor = pltpu.bitcast(
                    unpacked[0][made(place, blocks.width), columns], _stored.factor_dtype(kind, blocks.times)
                )
            else:
                factor = w[part, own, columns]
            held = x[:, columns]
            sums = multiply(pltpu.bitcast(held, kind.dot) if packing == 2 else held, factor, transposed=True)
            if not (alone and at == 0):
                sums = acc[part, :, own] + sums
            if finishes and at + run == x.shape[1]:
                finish(own, sums)
            else:
                acc[part, :, own] = sums

        def multiply_turn(begin):
            for first in range(0, turn, blocks.width):
                for at in runs:
                    for f in range(first, first + blocks.width, blocks.unpacked) if unpacked and blocks.early else ():
                        make(after(begin, f, blocks.unpacked), f, at, run)
                    own = after(begin, first, blocks.width)
                    multiply_piece(own, first if blocks.early else own, at)

        if unpacked and not blocks.early:
            in_turns(features, blocks.unpacked, lambda begin: make(begin, begin, 0, x.shape[1]))
        in_turns(features, turn, multiply_turn)

    def multiply_run(at, part):
        """The run of stored columns that begins at `at`; the weight of many rows is unpacked before."""

        def chunks(own):
            offsets = None if zeros is None else zeros.at[0, part, own]
            return chunks_of(kind, w.at[part, own], offsets, at, run, step, stored)

        def unpack(_, own):
            for i, chunk in enumerate(chunks(own)):
                kept[i][own] = chunk

        def multiply_piece(down, own, which=None):
            if together:
                unpack(down, own)
            theirs = None if scales is None else scales.at[:, :, :, own]
            groups = None if x_scales is None else x_scales.at[down]
            for i, chunk in enumerate((held[own] for held in kept) if kept else chunks(own)):
                if which in (None, i):
                    first = first_of(kind, at, i)
                    columns = x[down, pl.ds(first, chunk.shape[1])]
                    _add(kind, blocks, part, first, columns, chunk, theirs, groups, acc.at[:, down, own], step)

        together = kept and rows == blocks.height and blocks.unpacked == blocks.width
        if kept and not together:
            for_pieces(1, features, 1, blocks.unpacked, unpack)
        for which in range(len(kept)) if kept and 0 < kind.group < CHUNK else [None]:
            for_pieces(rows, features, blocks.height, blocks.width, functools.partial(multiply_piece, which=which))

    def multiply_runs(at):
        for part in range(kind.parts):
            multiply_run(at, part)

    if blocks.whole:
        for part in range(kind.parts):
            multiply_whole(part)
    elif run == width:
        multiply_runs(0)
    else:  # a loop keeps one run's registers apart from the next one's
        pl.loop(0, width // run)(lambda i: multiply_runs(pl.multiple_of(i * run, run)))

    if finishes:
        return
    height = min(rows, EPILOGUE_ROWS)

    @pl.when(step == steps - 1)
    def _():
        @pl.loop(0, y.shape[0] // height)
        def _(i):
            rows = pl.ds(pl.multiple_of(i * height, height), height)
            z = []
            for part in range(kind.parts):
                value = acc[part, rows].astype(jnp.float32)
                if scales is not None and not kind.group:
                    value *= _stored.beside_sums(scales[0, 0, part], blocks.times)
                if row_scale is not None:
                    value *= row_scale[rows, :1]
                z.append(value if bias is None else value + bias[part][None, :])
            y[rows] = activated(z, kind.activation).astype(y.dtype)


def _add(kind, blocks, part, at, x, chunk, scales, x_scales, acc, step):
    """Columns at .. at + 128 of one part (all of a block, where a scale serves a row) into the sum."""
    if not kind.group:
        acc[part] += multiply(x, chunk, transposed=True)
        return
    within, group = max(1, CHUNK // kind.group), group_of(kind, at)  # groups of a chunk, the first
    lane = stored_lane(kind, x.shape)
    masked = [x] if within == 1 else [cleared(x, lane >> kind.group.bit_length() - 1 == i) for i in range(within)]
    if blocks.stacks:
        sums = multiply(jnp.concatenate(masked, 0), chunk, transposed=True).reshape(within, *acc.shape[1:])
    else:
        sums = [multiply(one, chunk, transposed=True) for one in masked]
    total = None
    for i in range(within):
        one = sums[i].astype(jnp.float32) * scales[0, group + i, part][None, :]
        if x_scales is not None:
            one *= column(x_scales[...], step * scales.shape[1] + group + i)
        total = one if total is None else total + one
    acc[part] += total


def choose(chip, *, rows, features, columns, kind, zeros):
    """Sizes of a step.  Few rows: the weight is read once and copies bound the time, so its blocks are large and few.
    Many rows: as many as fit, since the weight is read, and unpacked, once for each BM of them."""
    size, packed = jnp.dtype(kind.dot).itemsize, kind.weight in PACKED
    tight = chip.registers < 64
    stored = {"int4": 0.5, "mxfp4": 0.5, "int8": 1, "fp8": 1}.get(kind.weight, size)
    bare = size == stored == 1 and not (kind.group or zeros or tight)  # bytes that nothing is made of
    unit = min(tile_rows(kind.dot), max(SUBLANES, power(rows))) if bare else tile_rows(kind.dot)
    most = 512 if size < 4 else 256
    m = min(-(-rows // unit) * unit, most)
    m = -(-m // EPILOGUE_ROWS) * EPILOGUE_ROWS if m > EPILOGUE_ROWS else m
    whole = m > FEW and not (kind.group and kind.apart) and chip.registers >= 64
    least = 2 * CHUNK if packed else CHUNK
    stacked = 0 < kind.group < CHUNK and not whole  # copies of x, and sums, for each group of a chunk
    bare = bare and m <= EPILOGUE_ROWS  # few bundles a byte: larger blocks
    at_once = bare and m == SUBLANES  # sums of all features and columns of a block fit the registers
    n = min(power(max(features, LANES)), (128 if stacked else 1024 if bare else 512) // kind.parts)
    large = chip.matrix > LANES and chip.longest == LONGEST  # sums go through registers
    before = kind.group or (kind.weight == "fp8" and size > 1)  # what is made of such a weight takes registers too
    if whole and (large or kind.parts > 1) and not (before if large else kind.group):  # one scale serves a row
        n = min(power(max(features, LANES)), 1024 // kind.parts)
    bare_nibbles = whole and kind.weight == "int4" and not (kind.group or zeros)
    times = HIGH if bare_nibbles and chip.fp8 and kind.dot == jnp.bfloat16 else 0
    n = min(power(max(features, LANES)), 2048) if times and kind.parts == 1 else n
    n = max(n, LANES)
    k = min(power(max(columns, least)), 4096 if whole or bare else 2048)

    def run(k):
        if whole:
            return min(k, chip.longest // 2 if bare_nibbles and chip.matrix == LANES else chip.longest)
        if kind.group or packed:
            return CHUNK
        if at_once:
            return k
        if m <= FEW and not tight:
            return min(k, max(2048, chip.longest))
        return min(k, CHUNK if tight and kind.weight != "dense" else LONGEST)

    def vmem(k):
        made = (k if whole else run(k) * (2 if packed else 1)) * (1 if times else size)
        weights = 2 * kind.parts * n * k * stored + n * made
        return int(weights + 2 * m * k * size + m * n * (4 * kind.parts + 2 * size))

    while k > least and (vmem(k) > chip.vmem_limit * 2 // 3):
        k //= 2
    direct = size == stored and not zeros
    height = m if m <= FEW or whole else divisor(m, 32 if stacked and tight else HEIGHT, EPILOGUE_ROWS)
    live = n if at_once else chip.features[zeros]  # beyond few rows, of a piece's sum
    width = max(LANES, min(n, live if m <= FEW else chip.matrix if whole else 4 * chip.registers))
    bytes_at_once = whole and direct and size == 1 and chip.longest > LONGEST
    width = n if bytes_at_once else width
    turn = n if chip.longest > LONGEST and not kind.group else max(width, n // 2)
    turn = width if zeros or (chip.longest > LONGEST and kind.group) else turn
    early = whole and not (large and before) and not (kind.group and kind.parts > 1 and chip.longest > LONGEST)
    finishes = chip.longest == LONGEST and not (large and kind.activation.startswith("gelu"))  # spills
    unpacked = width if tight and packed else 0
    if m > FEW:
        unpacked = UNPACKED // (2 if kind.weight == "mxfp4" else kind.parts)  # v6e spills for more of mxfp4
    return Blocks(
        m, n, k, height, width, run(k), not tight, unpacked, whole, turn, early, finishes, times, vmem(k),
        chip.vmem_limit,
    )  # fmt: skip
