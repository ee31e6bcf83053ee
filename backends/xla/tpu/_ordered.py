"""Int4 with a scale a row, by many rows, in one kernel that puts x into the order of packed columns.

    x [M K]  ->  BM rows in that order, kept for all features       grid (M / BM, N / BN)

A block has all columns.  The first one of some rows orders a run of columns while the run before is multiplied, which
fills bundles in which the matrix unit is fed.  Each run is kept in a buffer of its own: of one for all, the compiler
would have a product wait for what is stored beside it.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._activations import activated
from ._numbers import LANES, multiply
from ._pieces import after, in_turns
from ._product import LONGEST, UNPACKED
from ._stored import CHUNK, beside_sums, factors_of, part_lanes
from ._tiles import power

FEATURES = 2048  # of a block
RUN = LONGEST  # columns that are put into order at once
MOST = 4096  # columns: the program spells out their runs
HEIGHT = 512  # rows of a block
STRIP = 128  # rows of a run whose lanes move together; of more, registers are stored


def choose(chip, blocks, *, kind, features):
    """The sizes of `choose` of _product.py, made those of this kernel; None where it does not take the call.

    A turn is half a block, so that where x is ready no registers are stored; where it is not, a block is one piece.  Of
    an only block, or with another activation than none, registers are stored there.
    """
    m, k = blocks.m, -(-kind.columns // RUN) * RUN
    plain = (kind.weight, kind.group, kind.apart, kind.activation) == ("int4", 0, False, "none")
    large = chip.matrix > LANES and chip.longest == LONGEST
    if not (plain and large and kind.dot == jnp.bfloat16 and blocks.whole and m == HEIGHT and k <= MOST):
        return None

    def vmem(n):
        return m * k * 6 + 3 * n * k + m * n * 8 + 2 * m * LANES * 4

    n = min(max(power(features), chip.matrix), FEATURES)
    while n > chip.matrix and vmem(n) > chip.vmem_limit * 2 // 3:
        n //= 2
    if features <= n or vmem(n) > chip.vmem_limit * 2 // 3:
        return None
    turn = max(n // 2, chip.matrix)
    return replace(blocks, n=n, k=k, width=chip.matrix, run=RUN, turn=turn, vmem=vmem(n))


def product(x, values, scales, *, kind, blocks, row_scale, bias, out_dtype, interpret):
    """act(row_scale * (x @ dequantized valuesT) + bias) [M N] in out_dtype, of x [M K] bfloat16.

    Args:
        values: [N K / 2], two int4 a byte.
        scales: float32 [N 1].
        row_scale: float32 [M], or None.
    """
    (rows, columns), features = x.shape, values.shape[0]
    m, n, k = blocks.m, blocks.n, blocks.k
    down = (0, -rows % m)
    by_feature = pl.BlockSpec((1, n), lambda i, j: (0, j))
    operands = [jnp.pad(x, (down, (0, k - columns))), values, scales.reshape(1, features)]
    specs = [pl.BlockSpec((m, k), lambda i, j: (i, 0)), pl.BlockSpec((n, k // 2), lambda i, j: (j, 0)), by_feature]
    if row_scale is not None:
        operands.append(jnp.pad(jnp.broadcast_to(row_scale[:, None], (rows, LANES)), (down, (0, 0))))
        specs.append(pl.BlockSpec((m, LANES), lambda i, j: (i, 0)))
    if bias is not None:
        operands.append(bias.astype(jnp.float32).reshape(1, features))
        specs.append(by_feature)
    y = pl.pallas_call(
        functools.partial(_kernel, kind, blocks, row_scale is not None, bias is not None),
        grid=(operands[0].shape[0] // m, -(-features // n)),
        in_specs=specs,
        out_specs=pl.BlockSpec((m, n), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((operands[0].shape[0], features), out_dtype),
        scratch_shapes=[
            pltpu.VMEM((m, n), jnp.float32), pltpu.VMEM((n // 2, k), jnp.int32),
            *[pltpu.VMEM((m // 2, RUN), jnp.int32)] * (k // RUN),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem_limit
        ),
        name="product_int4_ordered",
        interpret=interpret,
    )(*operands)  # fmt: skip
    return y[:rows]


def _kernel(kind, blocks, scaled, biased, x, w, scales, *refs):
    """One block.  x [BM K], w [BN K / 2], scales and bias [1 BN], y [BM BN].

    made: the weight as it is multiplied, and kept: runs of x in order, both in words of two bfloat16 rows.
    """
    held = list(refs)
    row_scale, bias = (held.pop(0) if given else None for given in (scaled, biased))
    y, acc, made, *kept = held
    columns, features, width = x.shape[1], w.shape[0], blocks.width
    runs = range(0, columns, RUN)

    def finish(own, sums):
        value = sums * beside_sums(scales[0, own], 0)
        if row_scale is not None:
            value *= jnp.concatenate([row_scale[...]] * (width // LANES), 1)
        if bias is not None:
            value += bias[0, own][None, :]
        y[:, own] = activated([value], kind.activation).astype(y.dtype)

    def order(at):
        for first in range(0, x.shape[0], STRIP):
            rows, words = pl.ds(first, STRIP), pl.ds(first // 2, STRIP // 2)
            for place in range(0, RUN, 2 * LANES):
                own = pl.ds(place, 2 * LANES)
                part_lanes(x.at[rows, pl.ds(at + place, 2 * LANES)], kept[at // RUN].at[words, own])

    def make(begin, place, at):
        """The weight of UNPACKED features from `begin` on, in one run of columns."""
        for stored_column in range(at // 2, (at + RUN) // 2, CHUNK):
            own = w.at[pl.ds(begin, UNPACKED)]
            for into, chunk in factors_of(kind, own, None, None, stored_column, 0, columns // 2, times=0):
                made[pl.ds(place // 2, UNPACKED // 2), pl.ds(into, CHUNK)] = pltpu.bitcast(chunk, jnp.int32)

    def multiply_piece(begin, place, at):
        """One run of columns by the features from `begin` on, which are made at `place`."""
        for f in range(0, width, UNPACKED):
            make(after(begin, f, UNPACKED), place + f, at)
        own = pl.ds(begin, width)
        factor = pltpu.bitcast(made[pl.ds(place // 2, width // 2), pl.ds(at, RUN)], kind.dot)
        sums = multiply(pltpu.bitcast(kept[at // RUN][...], kind.dot), factor, transposed=True)
        sums = sums if at == 0 else acc[:, own] + sums
        if at == runs[-1]:
            finish(own, sums)
        else:
            acc[:, own] = sums

    def multiply_turn(begin):
        for first in range(0, blocks.turn, width):
            for at in runs:
                multiply_piece(after(begin, first, width), first, at)

    begins = pl.program_id(1) == 0

    @pl.when(begins)
    def _():
        order(0)
        for at in runs:
            if at != runs[-1]:
                order(at + RUN)
            for first in range(0, features, width):
                multiply_piece(first, first, at)

    @pl.when(jnp.logical_not(begins))
    def _():
        in_turns(features, blocks.turn, multiply_turn)
