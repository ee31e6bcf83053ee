"""The product of few rows, at most 16: what takes time is the way of the weight's bytes.

    y [rows, features]        a program sums all rows x BLOCK_N features over its share of the columns k

        columns k ──>   SLICES of WIDE columns each, one a warp
        ┌──────┬──────┬──────┬──────┐
        │ 0    │ 1    │ 2    │ 3    │       each warp: its slice of BLOCK_N rows of the weight times its slice of x
        └──────┴──────┴──────┴──────┘       [BLOCK_M, WIDE], times the scales of that slice; in the end the warps' sums
                                            are added

Warps share k, not features: each then unpacks the rows of x that it needs, and no others, and a group of columns with
scales of its own is a slice.  The weight is on the left of the product, where an instruction takes 16 rows, and x on
the right, where it takes 8: so up to 8 rows cost half of what 16 do.

Nibbles are read as words of four.  One instruction unpacks the same nibble of two words, so a product is of every
fourth column, and there are four of them: no nibble is moved to where its column lies.

SPLIT programs share the columns of a tile where there are too few tiles for the GPU; each stores its sum in float32,
and _product.finish adds them in their order.
"""

import triton
import triton.language as tl

from ._codes import bytes_, nibbles, scales_of
from ._epilogue import features_of, finished, store
from ._product import loaded
from ._ptx import after_previous, fours, pairs


@triton.jit(do_not_specialize=["rows"])  # or every batch size would compile anew
def multiply_few(
    x, x_scales, weight, scales, zeros, bias, y, parts,
    rows, features, columns, x_row, weight_row,
    KIND: tl.constexpr, DOT: tl.constexpr, GROUP: tl.constexpr, X_GROUPED: tl.constexpr, SCALE_ROWS: tl.constexpr,
    FACTOR: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr,
    WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr, SLICES: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """Arguments as those of _product.multiply; rows <= BLOCK_M, and WIDE divides GROUP where that is not 0.

    WORDS: weight is int16, four nibbles each, the first the lowest; columns are a multiple of 4.
    STAGES is num_stages, said of the loop, so that scales too are copied to shared memory that many passes early: else
    each pass waits for its own.  What is a byte each cannot be copied so, and is read one pass early.
    """
    after_previous(CHAINED)
    PACKED: tl.constexpr = KIND == "int4" or KIND == "mxfp4"
    ZEROS: tl.constexpr = zeros is not None
    SUM: tl.constexpr = tl.int32 if tl.int8 == DOT else tl.float32
    BLOCK_K: tl.constexpr = SLICES * WIDE
    share = tl.program_id(1)
    row = tl.arange(0, BLOCK_M)
    there = (row < rows)[:, None]
    feature = features_of(tl.program_id(0), features, GATED, BLOCK_N)
    safe_feature = tl.where(feature < features, feature, 0)
    x_rows = x + (row.to(tl.int64) * x_row)[:, None]
    weight_rows = weight + (safe_feature.to(tl.int64) * weight_row)[:, None]
    groups = tl.cdiv(columns, GROUP) if GROUP else 1
    scale_at = ((safe_feature // SCALE_ROWS).to(tl.int64) * groups)[None, :]
    sums = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32 if GROUP else SUM)
    length = tl.cdiv(tl.cdiv(columns, BLOCK_K), SPLIT) * BLOCK_K
    begin = share * length
    end = tl.minimum(begin + length, columns)
    BYTES: tl.constexpr = KIND == "mxfp4"
    zero = tl.zeros([SLICES, BLOCK_N], tl.int8)
    if ZEROS:
        zero = _of_groups(zeros, scale_at, begin, groups, GROUP, WIDE, SLICES)
    if BYTES:
        scale = _of_groups(scales, scale_at, begin, groups, GROUP, WIDE, SLICES)

    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        column = start + tl.arange(0, BLOCK_K)
        inside = there if EVEN else there & (column < columns)[None, :]
        a = tl.load(x_rows + column[None, :], mask=inside, other=0.0, cache_modifier=".ca").to(DOT)
        next_zero = zero
        if ZEROS:
            next_zero = _of_groups(zeros, scale_at, start + BLOCK_K, groups, GROUP, WIDE, SLICES)
        if BYTES:
            next_scale = _of_groups(scales, scale_at, start + BLOCK_K, groups, GROUP, WIDE, SLICES)
        if WORDS:
            word = start // 4 + tl.arange(0, BLOCK_K // 4)
            codes = loaded(weight_rows + word[None, :], word[None, :], columns // 4, EVEN)
            codes = _sliced(codes, SLICES)
            if PTX:
                q0, q1, q2, q3 = fours(codes, zero[:, :, None], ZEROS, DOT)
            else:
                q0 = nibbles(codes, zero[:, :, None], ZEROS, KIND, DOT)
                q1 = nibbles(codes >> 4, zero[:, :, None], ZEROS, KIND, DOT)
                q2 = nibbles(codes >> 8, zero[:, :, None], ZEROS, KIND, DOT)
                q3 = nibbles(codes >> 12, zero[:, :, None], ZEROS, KIND, DOT)
            even, odd = tl.split(tl.reshape(a, (BLOCK_M, BLOCK_K // 4, 2, 2)))
            a0, a2 = tl.split(even)
            a1, a3 = tl.split(odd)
            part = _dot(q0, a0, None, SUM, SLICES)
            part = _dot(q1, a1, part, SUM, SLICES)
            part = _dot(q2, a2, part, SUM, SLICES)
            part = _dot(q3, a3, part, SUM, SLICES)
        elif PACKED:
            half = start // 2 + tl.arange(0, BLOCK_K // 2)
            codes = _sliced(loaded(weight_rows + half[None, :], half[None, :], (columns + 1) // 2, EVEN), SLICES)
            if PTX:
                low, high = pairs(codes, zero[:, :, None], ZEROS, KIND, DOT)
            else:
                low = nibbles(codes, zero[:, :, None], ZEROS, KIND, DOT)
                high = nibbles(codes >> 4, zero[:, :, None], ZEROS, KIND, DOT)
            even, odd = tl.split(tl.reshape(a, (BLOCK_M, BLOCK_K // 2, 2)))
            part = _dot(high, odd, _dot(low, even, None, SUM, SLICES), SUM, SLICES)
        else:
            codes = loaded(weight_rows + column[None, :], column[None, :], columns, EVEN)
            b = bytes_(_sliced(codes, SLICES), zero[:, :, None], ZEROS, KIND, DOT, PTX)
            part = _dot(b, a, None, SUM, SLICES)
            if ZEROS and tl.int8 == DOT:  # q - zero may take 9 bits
                part -= tl.sum(_turned(a, SLICES).to(tl.int32), 1)[:, None, :] * zero.to(tl.int32)[:, :, None]
        if GROUP:
            here = scale if BYTES else _of_groups(scales, scale_at, start, groups, GROUP, WIDE, SLICES)
            part = part.to(tl.float32) * scales_of(here, KIND)[:, :, None]
            if X_GROUPED:
                group = tl.minimum((start + tl.arange(0, SLICES) * WIDE) // GROUP, groups - 1)
                x_scale = x_scales + row[None, :] * groups + group[:, None]
                part *= tl.load(x_scale, mask=(row < rows)[None, :], other=0.0)[:, None, :]
        sums += part
        zero = next_zero
        if BYTES:
            scale = next_scale

    z = tl.trans(_added(sums)).to(tl.float32) * FACTOR
    if scales is not None and GROUP == 0:
        z *= scales_of(tl.load(scales + safe_feature), KIND)[None, :]
    if x_scales is not None and not X_GROUPED:
        z *= tl.load(x_scales + row, mask=row < rows, other=0.0)[:, None]
    if SPLIT > 1:
        at = parts + ((share * rows + row).to(tl.int64) * features)[:, None] + feature[None, :]
        tl.store(at, z, mask=there & (feature < features)[None, :])
    else:
        z = finished(z, bias, feature, features, ACTIVATION, GATED, BLOCK_M, BLOCK_N)
        store(z, y, row, tl.program_id(0), rows, features, GATED, BLOCK_N)


@triton.jit
def _of_groups(values, at, start, groups, GROUP: tl.constexpr, WIDE: tl.constexpr, SLICES: tl.constexpr):
    """Scales or zero points [SLICES, BLOCK_N] of the groups in which slices begin; at [1, BLOCK_N]."""
    group = tl.zeros([SLICES], tl.int32)
    if GROUP:
        group = tl.minimum((start + tl.arange(0, SLICES) * WIDE) // GROUP, groups - 1)
    return tl.load(values + at + group[:, None])


@triton.jit
def _sliced(codes, SLICES: tl.constexpr):
    """[BLOCK_N, k] as [SLICES, BLOCK_N, k / SLICES]."""
    return tl.permute(tl.reshape(codes, (codes.shape[0], SLICES, codes.shape[1] // SLICES)), (1, 0, 2))


@triton.jit
def _turned(a, SLICES: tl.constexpr):
    """[BLOCK_M, k] as [SLICES, k / SLICES, BLOCK_M]."""
    return tl.permute(tl.reshape(a, (a.shape[0], SLICES, a.shape[1] // SLICES)), (1, 2, 0))


@triton.jit
def _dot(weights, a, sums, SUM: tl.constexpr, SLICES: tl.constexpr):
    """sums [SLICES, BLOCK_N, BLOCK_M] + weights [SLICES, BLOCK_N, k] times, of each slice, a [BLOCK_M, SLICES * k]."""
    return tl.dot(weights, _turned(a, SLICES), sums, out_dtype=SUM, input_precision="ieee")


@triton.jit
def _added(sums):
    """The sum of [SLICES, BLOCK_N, BLOCK_M] over slices.

    Split, so that one thread is handed what it adds: tl.sum, which sends sums from warp to warp and back, took 0.7 us.
    """
    sums = tl.permute(sums, (1, 2, 0))
    for _ in tl.static_range(5):  # at most 32 slices
        if sums.shape[2] > 1:
            first, second = tl.split(tl.reshape(sums, (sums.shape[0], sums.shape[1], sums.shape[2] // 2, 2)))
            sums = first + second
    return tl.reshape(sums, (sums.shape[0], sums.shape[1]))
