"""W8A8 of many rows in one kernel, which rounds x: that fills bundles in which the matrix unit is fed.

    x [M K]  ->  peaks of its rows  ->  BM rows in 8 bits, kept for all features       grid (M / BM, N / BN)

A block has all columns.  The first one of some rows rounds a run of columns while those before are multiplied.  The
compiler rounds as late as it can, and then has too few registers, or slots, for what it put off:

- v6e: pieces of features follow each other, one run behind, and the first meets its new run in halves, between the
  others; so vectors are rounded, and sums are scaled, at the rate of the matrix unit.
- v7x, where a half costs more pushes than it saves: neighbouring runs are kept apart, and where rows of a run begin is
  told at run time, so that all of them are rounded before one is multiplied.  It multiplies no bytes: its compiler
  would make them bfloat16 again for each block, so they are kept as that.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._activations import activated
from ._bytes import STRIP, peak_of, scales_of, whole
from ._numbers import LANES, multiply
from ._product import LONGEST
from ._tiles import divisor, lanes, power

FEATURES = 1024  # of a block; more make its first copy, which nothing hides, too long
RUN = LONGEST  # columns that are rounded at once
MOST = 4096  # columns: the program spells out their runs
HEIGHT = 512  # rows of a block; of fewer, too many of which are rounded at once, registers are stored
ROWS = 256  # whose peaks are looked for at once
SCALED = 128  # rows whose scales are found at once


def choose(chip, blocks, *, kind, features, size):
    """The sizes of `choose` of _product.py, made those of this kernel; None where it does not take the call.

    Args:
        size: bytes of a number of x.
    """
    m, k, adds = blocks.m, lanes(kind.columns), chip.longest > LONGEST
    plain = kind.weight == "int8" and kind.dot == jnp.int8 and not kind.group and kind.parts == 1
    if not (plain and blocks.whole and m == HEIGHT and chip.matrix > LANES and k <= MOST):
        return None

    def vmem(n):
        kept = 4 if adds else 1  # two of bfloat16
        return m * k * (2 * size + kept) + 2 * n * k + m * n * (4 + 2 * size) + 2 * m * LANES * 4

    n = min(power(max(features, LANES)), FEATURES)
    while n > chip.matrix and vmem(n) > chip.vmem_limit * 2 // 3:
        n //= 2
    if vmem(n) > chip.vmem_limit * 2 // 3:
        return None
    run = min(k, chip.longest // RUN * RUN)
    return replace(blocks, n=n, k=k, width=n if adds else min(n, chip.matrix), run=run, vmem=vmem(n))


def product(x, values, scales, *, kind, blocks, bias, out_dtype, chip, interpret):
    """act(dequantized x @ valuesT + bias) [M N] in out_dtype, of x [M K] bfloat16 or float32.

    Args:
        values: int8 [N K].
        scales: float32 [N 1].
    """
    (rows, columns), features = x.shape, values.shape[0]
    m, n, k, adds = blocks.m, blocks.n, blocks.k, chip.longest > LONGEST
    x = jnp.pad(x, ((0, -rows % m), (0, k - columns)))
    beside = [scales.reshape(1, features)] + ([] if bias is None else [bias.astype(jnp.float32).reshape(1, features)])
    by_feature = [pl.BlockSpec((1, n), lambda i, j: (0, j))] * len(beside)
    kept = [pltpu.VMEM((m, k), jnp.bfloat16)] * 2 if adds else [pltpu.VMEM((m, k), jnp.int8)]
    y = pl.pallas_call(
        functools.partial(_kernel, kind, blocks, bias is not None),
        grid=(x.shape[0] // m, -(-features // n)),
        in_specs=[pl.BlockSpec((m, k), lambda i, j: (i, 0)), pl.BlockSpec((n, k), lambda i, j: (j, 0)), *by_feature],
        out_specs=pl.BlockSpec((m, n), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], features), out_dtype),
        scratch_shapes=[
            *[pltpu.VMEM((m, LANES), jnp.float32)] * 2, pltpu.VMEM((m, n), jnp.float32 if adds else jnp.int32), *kept
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=blocks.vmem_limit
        ),
        name="product_w8a8",
        interpret=interpret,
    )(x, values, *beside)  # fmt: skip
    return y[:rows]


def _kernel(kind, blocks, biased, x, w, scales, *refs):
    """One block.  x [BM K], w [BN K], scales and bias [1 BN], y [BM BN]; kept: x as it is multiplied."""
    bias, y, row_scales, factors, acc, *kept = refs if biased else (None, *refs)
    rows, columns, features, width = x.shape[0], x.shape[1], w.shape[0], blocks.width
    runs, pieces, all_rows = range(0, columns, RUN), range(0, features, width), pl.ds(0, rows)

    def kept_of(at):
        return kept[at // RUN % len(kept)]

    def finish(down, own, sums):
        value = sums.astype(jnp.float32) * scales[0, own][None, :]
        value *= jnp.concatenate([row_scales[down]] * (width // LANES), 1)
        if bias is not None:
            value += bias[0, own][None, :]
        y[down, own] = activated([value], kind.activation).astype(y.dtype)

    def multiply_piece(first, at, length=RUN, down=all_rows, begin=None):
        """`length` columns from `at` on of `width` features from `first` on, into the rows `down`, which are all that
        begin at `begin` where it is given."""
        end, own = min(at + length, columns), pl.ds(first, width)
        taken = down if begin is None else pl.ds(begin, rows)
        parts = [kept_of(one)[taken, one : min(one + RUN, end)] for one in range(at, end, RUN)]
        sums = multiply(jnp.concatenate(parts, 1), w[own, at:end].astype(parts[0].dtype), transposed=True)
        sums = sums if at == 0 else acc[down, own] + sums
        if end == columns:
            finish(down, own, sums)
        else:
            acc[down, own] = sums

    def round_run(at, first, height):
        for begin in range(first, first + height, STRIP):
            strip = pl.ds(begin, STRIP)
            for place in range(at, min(at + RUN, columns), LANES):
                number = x[strip, place : place + LANES].astype(jnp.float32) * factors[strip]
                kept_of(at)[strip, place : place + LANES] = whole(number, kept[0].dtype)

    def find_peaks(begin, height):
        for first in range(0, height, STRIP):
            strip = pl.ds(pl.multiple_of(begin + first, STRIP), STRIP)
            row_scales[strip] = peak_of(x, strip)

    def find_scales(begin, height):
        for first in range(0, height, STRIP):
            strip = pl.ds(pl.multiple_of(begin + first, STRIP), STRIP)
            scale, row_scales[strip] = scales_of(row_scales[strip])
            factors[strip] = 1.0 / scale

    def in_rows(most, do):
        height = divisor(rows, most, STRIP)
        pl.loop(0, rows // height)(lambda i: do(i * height, height))

    def multiply_in_halves():
        half = rows // 2
        for turn in range(len(runs) + len(pieces) - 1):
            behind = [(first, turn - i) for i, first in enumerate(pieces) if i and 0 <= turn - i < len(runs)]
            for first in range(0, rows, half) if turn < len(runs) else ():
                round_run(runs[turn], first, half)
                multiply_piece(0, runs[turn], down=pl.ds(first, half))
                for other, run in behind[:-1]:
                    multiply_piece(other, runs[run])
                behind = behind[-1:]
            for other, run in behind:
                multiply_piece(other, runs[run])

    def multiply_apart():
        begin = pl.multiple_of(pl.program_id(1) * STRIP, STRIP)  # 0 here, which the compiler does not know
        round_run(0, 0, rows)
        for at in runs:
            if at + RUN < columns:
                round_run(at + RUN, 0, rows)
            for first in pieces:
                multiply_piece(first, at, begin=begin)

    begins = pl.program_id(1) == 0

    @pl.when(begins)
    def _():
        in_rows(ROWS, find_peaks)
        in_rows(SCALED, find_scales)
        multiply_in_halves() if len(kept) == 1 else multiply_apart()

    @pl.when(jnp.logical_not(begins))
    def _():
        for first in pieces:
            for at in range(0, columns, blocks.run):
                multiply_piece(first, at, blocks.run)
