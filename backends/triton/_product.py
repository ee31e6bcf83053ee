"""One product for every weight: y = act(x @ weightT + bias), of rows that _rows.py made ready.

    y [rows, features]        a program sums BLOCK_M x BLOCK_N of it over its share of the columns k

              features ──>                    for each BLOCK_K columns of its share:
        rows  ┌────┬────┬────┬─               a = x [BLOCK_M, BLOCK_K]
         │    │    │    │    │                b = weight [BLOCK_N, BLOCK_K], integers or fp8, not yet scaled
         v    ├────┼────┼────┼─               sum += a @ bT, times the scales of the group
              │    │    │    │
                                              then: scales of rows, bias, activation, one rounding, store

Tiles come in an order that keeps a band of weights in L2.  Where there are more than processors, a program takes tile
after tile in one loop over the columns of all: a tile is stored while the next one's columns come (FLAT).  Where there
are too few for the GPU, SPLIT programs share the columns of a tile; each stores its sum in float32, and `finish` adds
them in their order.  Up to 16 rows have a kernel of their own, _few.py.

Two nibbles a byte are two products, of the even columns and of the odd ones: no byte is moved to unpack.
"""

import triton
import triton.language as tl

from ._codes import bytes_, nibbles, scales_of
from ._epilogue import features_of, finished, store
from ._ptx import after_previous, pairs


@triton.jit(do_not_specialize=["rows"])  # or every batch size would compile anew
def multiply(
    x, x_scales, weight, scales, zeros, bias, y, parts,
    rows, features, columns, x_row, weight_row,
    KIND: tl.constexpr, DOT: tl.constexpr, GROUP: tl.constexpr, X_GROUPED: tl.constexpr, SCALE_ROWS: tl.constexpr,
    FACTOR: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr, SPLIT: tl.constexpr,
    TMA: tl.constexpr, FLAT: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """
    x             [rows, columns], unit stride along a row, in the order of the weight's stored columns; its values in
                  DOT, if they were rounded to 8 bits
    x_scales      float32 [rows, columns / 128] where X_GROUPED, else [rows]; None where x was not rounded
    weight        [features, columns], nibbles: [features, ceil(columns / 2)] uint8; unit stride along a row
    scales        [ceil(features / SCALE_ROWS), ceil(columns / GROUP)], where GROUP is 0 [features]; None: dense
    zeros         like scales; None where the scheme is symmetric
    y             [rows, features], contiguous; where SPLIT > 1, parts float32 [SPLIT, rows, features]
    PTX           unpack nibbles by NVIDIA's own instructions: _ptx.pairs
    TMA           x, weight and y are tensor descriptors of those arrays, a block of y half a tile wide.  Where GATED,
                  weight is [2, features / 2, columns], so that one block has rows of gates and of what they gate
    FLAT          programs for each processor, who take tile after tile; 0: a program for each tile
    FACTOR        what every product is multiplied by besides
    """
    after_previous(CHAINED)
    FOLD: tl.constexpr = GROUP > 0 and GROUP < BLOCK_K  # scales go into the weights: their products are rounded to DOT
    AFTER: tl.constexpr = GROUP > 0 and GROUP >= BLOCK_K  # scales are applied to the sum of a pass
    ONE_SCALE: tl.constexpr = SCALE_ROWS % BLOCK_N == 0 and not GATED  # for all features of a tile
    SUM: tl.constexpr = tl.int32 if tl.int8 == DOT and GROUP == 0 else tl.float32
    ZEROS: tl.constexpr = zeros is not None
    PACKED: tl.constexpr = KIND == "int4" or KIND == "mxfp4"
    groups = tl.cdiv(columns, GROUP) if GROUP else 1
    x_group = x_scales if X_GROUPED else None
    share = tl.program_id(1)
    length = tl.cdiv(tl.cdiv(columns, BLOCK_K), SPLIT) * BLOCK_K
    begin = share * length
    end = tl.minimum(begin + length, columns)
    first, last, step = tl.program_id(0), tl.cdiv(rows, BLOCK_M) * tl.cdiv(features, BLOCK_N), tl.num_programs(0)
    if FLAT == 0:
        last, step = first + 1, 1

    for index in tl.range(first, last, step, flatten=FLAT > 0):
        tile_m, tile_n = _tile(index, rows, features, BLOCK_M, BLOCK_N, BAND)
        row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        feature = features_of(tile_n, features, GATED, BLOCK_N)
        safe_row = tl.where(row < rows, row, 0).to(tl.int64)
        safe_feature = tl.where(feature < features, feature, 0)
        x_rows, weight_rows = x, weight
        if not TMA:
            x_rows = x + (safe_row * x_row)[:, None]
            weight_rows = weight + (safe_feature.to(tl.int64) * weight_row)[:, None]
        scale_row = tile_n * BLOCK_N // SCALE_ROWS if ONE_SCALE else safe_feature // SCALE_ROWS
        scale_at = scale_row.to(tl.int64) * groups
        sums = tl.zeros([BLOCK_M, BLOCK_N], SUM)
        scale = _scales_at(scales, scale_at, begin, columns, KIND, GROUP if AFTER else 0)
        zero = _zeros_at(zeros, scale_at, feature, begin, columns, GROUP)
        x_scale = _x_scales_at(x_group, safe_row, begin, columns, GROUP)

        for start in range(begin, end, BLOCK_K):
            column = start + tl.arange(0, BLOCK_K)
            if TMA:
                a = x.load([tile_m * BLOCK_M, start])
            else:
                a = loaded(x_rows + column[None, :], column[None, :], columns, EVEN)
            # Read a pass early; after the first, most lie in a line of L1 that an earlier group brought.
            next_scale = _scales_at(scales, scale_at, start + BLOCK_K, columns, KIND, GROUP if AFTER else 0)
            next_x_scale = _x_scales_at(x_group, safe_row, start + BLOCK_K, columns, GROUP)
            next_zero = _zeros_at(zeros, scale_at, feature, start + BLOCK_K, columns, GROUP)
            spread = zero[:, None]
            if PACKED:
                half = start // 2 + tl.arange(0, BLOCK_K // 2)
                if TMA:
                    codes = _described(weight, tile_n, start // 2, GATED, BLOCK_N, BLOCK_K // 2)
                else:
                    codes = loaded(weight_rows + half[None, :], half[None, :], (columns + 1) // 2, EVEN)
                even, odd = tl.split(tl.reshape(a.to(DOT), (BLOCK_M, BLOCK_K // 2, 2)))
                if PTX:
                    low, high = pairs(codes, spread, ZEROS, KIND, DOT)
                else:
                    low, high = nibbles(codes, spread, ZEROS, KIND, DOT), nibbles(codes >> 4, spread, ZEROS, KIND, DOT)
                if FOLD:
                    fold = _fold_at(scales, scale_at, start, columns, KIND, GROUP, BLOCK_K).to(DOT)
                    low, high = _folded(low, fold), _folded(high, fold)
                part = _dot(odd, high, _dot(even, low, None if AFTER else sums))
            else:
                if TMA:
                    codes = _described(weight, tile_n, start, GATED, BLOCK_N, BLOCK_K)
                else:
                    codes = loaded(weight_rows + column[None, :], column[None, :], columns, EVEN)
                b = bytes_(codes, spread, ZEROS, KIND, DOT, PTX)
                if FOLD:
                    b = _folded(b, _fold_at(scales, scale_at, start, columns, KIND, GROUP, BLOCK_K).to(DOT))
                part = _dot(a.to(DOT), b, None if AFTER else sums)
            if ZEROS and KIND == "int8" and tl.int8 == DOT:  # q - zero may take 9 bits
                part -= tl.sum(a.to(tl.int32), 1)[:, None] * zero.to(tl.int32)[None, :]
            if AFTER:
                if ONE_SCALE:
                    sums += part.to(tl.float32) * (x_scale * scale)[:, None]
                elif X_GROUPED:
                    sums += part.to(tl.float32) * x_scale[:, None] * scale[None, :]
                else:
                    sums += part.to(tl.float32) * scale[None, :]
            else:
                sums = part
            scale, zero, x_scale = next_scale, next_zero, next_x_scale

        z = sums.to(tl.float32) * FACTOR
        if scales is not None and GROUP == 0:
            z *= scales_of(tl.load(scales + safe_feature), KIND)[None, :]
        if x_scales is not None and not X_GROUPED:
            z *= tl.load(x_scales + safe_row)[:, None]
        if SPLIT > 1:
            at = parts + ((share * rows + row).to(tl.int64) * features)[:, None] + feature[None, :]
            tl.store(at, z, mask=(row < rows)[:, None] & (feature < features)[None, :])
        else:
            z = finished(z, bias, feature, features, ACTIVATION, GATED, BLOCK_M, BLOCK_N)
            if TMA:
                _store_described(z.to(y.dtype), y, tile_m * BLOCK_M, tile_n, GATED, BLOCK_M, BLOCK_N // 2)
            else:
                store(z, y, row, tile_n, rows, features, GATED, BLOCK_N)


@triton.jit(do_not_specialize=["rows"])
def finish(
    parts, bias, y, rows, features,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """parts float32 [SPLIT, rows, features] -> y [rows, features]: the sums, in the order of the shares."""
    after_previous(CHAINED)
    row = tl.program_id(1) + tl.arange(0, 1)
    feature = features_of(tl.program_id(0), features, GATED, BLOCK_N)
    z = tl.zeros([1, BLOCK_N], tl.float32)
    for share in tl.static_range(SPLIT):
        at = parts + ((share * rows + row).to(tl.int64) * features)[:, None] + feature[None, :]
        z += tl.load(at, mask=(feature < features)[None, :], other=0.0)
    z = finished(z, bias, feature, features, ACTIVATION, GATED, 1, BLOCK_N)
    store(z, y, row, tl.program_id(0), rows, features, GATED, BLOCK_N)


@triton.jit
def _tile(index, rows, features, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr):
    """Which tile comes at `index`: down BAND tiles of rows, then to the next tile of features."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(features, BLOCK_N)
    band = index // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    within = index % (BAND * tiles_n)
    return band * BAND + within % height, within // height


@triton.jit
def _described(weight, tile, start, GATED: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    """A tile [BLOCK_N, WIDTH] of a weight that is a tensor descriptor; zeros past its ends."""
    if GATED:
        return tl.reshape(weight.load([0, tile * (BLOCK_N // 2), start]), (BLOCK_N, WIDTH))
    else:
        return weight.load([tile * BLOCK_N, start])


@triton.jit
def _store_described(z, y, row, tile, GATED: tl.constexpr, BLOCK_M: tl.constexpr, HALF: tl.constexpr):
    """A tile to y, a tensor descriptor whose block is half as wide: all of z where GATED, else in halves."""
    if GATED:
        y.store([row, tile * HALF], z)
    else:
        left, right = tl.split(tl.permute(tl.reshape(z, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        y.store([row, 2 * tile * HALF], left)
        y.store([row, (2 * tile + 1) * HALF], right)


@triton.jit
def loaded(at, index, count, EVEN: tl.constexpr):
    """What lies at `at`, and 0 past the end.  EVEN: tiles do not reach past it."""
    return tl.load(at) if EVEN else tl.load(at, mask=index < count, other=0.0)


@triton.jit
def _scales_at(scales, at, start, columns, KIND: tl.constexpr, GROUP: tl.constexpr):
    """The scales of the group that holds column `start`; any value past the last one."""
    found = 1.0
    if GROUP and scales is not None:
        group = tl.minimum(start, columns - 1) // GROUP
        found = scales_of(tl.load(scales + at + group), KIND)
    return found


@triton.jit
def _fold_at(
    scales, at, start, columns, KIND: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """The scales of each group of a tile, [BLOCK_N, BLOCK_K / GROUP]."""
    group = tl.minimum(start // GROUP + tl.arange(0, BLOCK_K // GROUP), tl.cdiv(columns, GROUP) - 1)
    return scales_of(tl.load(scales + at[:, None] + group[None, :]), KIND)


@triton.jit
def _folded(b, scale):
    """b [n, k] times scale [n, groups]."""
    apart = tl.reshape(b, (b.shape[0], scale.shape[1], b.shape[1] // scale.shape[1]))
    return tl.reshape(apart * scale[:, :, None], b.shape)


@triton.jit
def _zeros_at(zeros, at, feature, start, columns, GROUP: tl.constexpr):
    found = tl.zeros(feature.shape, tl.int8)
    if zeros is not None:
        group = tl.minimum(start, columns - 1) // GROUP if GROUP else 0
        found = tl.load(zeros + at + group)
    return found


@triton.jit
def _x_scales_at(x_scales, row, start, columns, GROUP: tl.constexpr):
    found = tl.full(row.shape, 1.0, tl.float32)
    if x_scales is not None:
        found = tl.load(x_scales + row * tl.cdiv(columns, GROUP) + tl.minimum(start, columns - 1) // GROUP)
    return found


@triton.jit
def _dot(a, b, sums):
    """sums + a [m, k] @ b [n, k]T"""
    if a.dtype == tl.int8:
        sums = tl.dot(a, tl.trans(b), sums, out_dtype=tl.int32)
    else:
        sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee")
    return sums
