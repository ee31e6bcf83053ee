"""Rows made ready: residual added, normalised, permuted, rounded to 8 bits; each row read once where it fits.

    program   ROWS rows (or groups of rows) x BLOCK columns at a time

    s = x + residual ─> kept          n = norm(s) * gain + shift ─> y, as it is or rounded with a scale a row

A row of at most ONE_PASS columns stays in registers from its load to its store; longer ones are read once for each sum
and once more for the store, then mostly from cache.  A group of columns with a scale of its own is a row of its own.
"""

import torch
import triton
import triton.language as tl

from ._chip import chip_of
from ._codes import e4m3
from ._launch import INTERPRETED, blocks, launch, power, readable
from ._ptx import after_previous
from ._tuned import choose

ONE_PASS = 16384  # columns; float32 in registers of 16 warps
LARGEST_GROUP = ONE_PASS


def prepared(
    x, *, norm="none", gain=None, shift=None, residual=None, eps=0.0, keep=None, rounding=None, group=0, scale=None,
    permutation=None, dtype=None,
):  # fmt: skip
    """Rows x [rows, width] as a product wants them.

    Args:
        norm: 'none', 'rms' or 'layer', with its gain and shift [width].
        keep: where s = x + residual is stored, [rows, width] contiguous, or None.
        rounding: None, 'int8' or 'fp8': y is rounded with a scale for each row, or for each `group` columns.
        scale: float32, one calibrated value in place of the computed ones.
        permutation: int32 [width]; column j of y is made of column permutation[j] of x.
        dtype: of y; where it is rounded, one that holds its values exactly.

    Returns:
        y [rows, width] contiguous, and scales float32 [rows, groups], None where y is not rounded.
    """
    if norm != "none" and group:  # sums over a row, then scales over parts of it
        x, _ = prepared(
            x, norm=norm, gain=gain, shift=shift, residual=residual, eps=eps, keep=keep, dtype=torch.float32
        )
        norm, gain, shift, residual, keep = "none", None, None, None, None
    x, residual, gain, shift = (readable(part) for part in (x, residual, gain, shift))
    rows, width = x.shape
    groups = blocks(width, group) if group else 1
    y = torch.empty((rows, width), dtype=dtype, device=x.device)
    chip = chip_of(x)
    native = chip.fp8 and not chip.amd  # converts float32 to e4m3 itself
    scales = torch.empty((rows, groups), dtype=torch.float32, device=x.device) if rounding else None
    wide = group or width
    tiles = choose("rows", x.device, _tiles(rows * groups, wide), dtype=x.dtype, width=power(wide), norm=norm)
    launch(
        _prepare, (blocks(rows * groups, tiles["ROWS"]),), x,
        x, residual, gain, shift, scale, permutation,
        y.view(torch.uint8) if dtype == torch.float8_e4m3fn and not native else y, keep, scales,
        rows * groups, width, groups, *x.stride(), *((0, 0) if residual is None else residual.stride()), eps,
        NORM=norm, GROUP=group, ROUNDING=rounding or "none", ONE=tiles["BLOCK"] >= wide,
        WHOLE=wide > 0 and width % wide == wide % tiles["BLOCK"] == 0, **tiles,
    )  # fmt: skip
    return y, scales


def _tiles(rows, width):
    """Whole rows where they fit, several where they are short: 16 elements a thread."""
    if INTERPRETED:
        return {"BLOCK": power(width, most=ONE_PASS), "ROWS": power(rows, most=16), "num_warps": 4, "num_stages": 1}
    block = power(width, 16) if width <= ONE_PASS else 8192
    return {
        "BLOCK": block,
        "ROWS": max(1, 1024 // block),
        "num_warps": min(16, max(2, block // 512)),
        "num_stages": 1,
    }


@triton.jit(do_not_specialize=["rows"])  # or every batch size would compile anew
def _prepare(
    x, residual, gain, shift, scale, permutation, y, kept, scales,
    rows, width, groups, x_row, x_column, residual_row, residual_column, eps,
    NORM: tl.constexpr, GROUP: tl.constexpr, ROUNDING: tl.constexpr, ONE: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """x, residual [rows / groups, width] -> y, kept the same and contiguous, scales [rows / groups, groups]."""
    after_previous(CHAINED)
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    there = index < rows
    row, first, own = index, 0, width
    if GROUP:
        row = index // groups
        first = ((index % groups) * GROUP).to(tl.int32)[:, None]
        own = tl.minimum(width - first, GROUP)
    x_rows = x + (row * x_row)[:, None]
    residual_rows = None
    if residual is not None:
        residual_rows = residual + (row * residual_row)[:, None]
    longest = BLOCK if ONE else (GROUP if GROUP else width)

    s = tl.zeros([1, 1], tl.float32)
    if ONE:
        column = tl.arange(0, BLOCK)[None, :]
        inside = there[:, None] & _within(column, own, WHOLE)
        s = _summed(x_rows, residual_rows, permutation, first + column, inside, x_column, residual_column)
    mean = tl.zeros([ROWS, 1], tl.float32)
    if NORM == "layer":
        for start in range(0, longest, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            inside = there[:, None] & _within(column, own, WHOLE)
            part = s
            if not ONE:
                part = _summed(x_rows, residual_rows, permutation, first + column, inside, x_column, residual_column)
            mean += tl.sum(part, 1)[:, None]
        mean /= width
    factor = tl.full([ROWS, 1], 1.0, tl.float32)
    if NORM != "none":
        squares = tl.zeros([ROWS, 1], tl.float32)
        for start in range(0, longest, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            inside = there[:, None] & _within(column, own, WHOLE)
            part = s
            if not ONE:
                part = _summed(x_rows, residual_rows, permutation, first + column, inside, x_column, residual_column)
            off = tl.where(inside, part - mean, 0.0)
            squares += tl.sum(off * off, 1)[:, None]
        factor = tl.rsqrt(squares / width + eps)

    step, finite = factor, there[:, None]
    if ROUNDING != "none":
        peak = tl.zeros([ROWS, 1], tl.int32)
        for start in range(0, longest, BLOCK):
            column = start + tl.arange(0, BLOCK)[None, :]
            inside = there[:, None] & _within(column, own, WHOLE)
            part = s
            if not ONE:
                part = _summed(x_rows, residual_rows, permutation, first + column, inside, x_column, residual_column)
            n = _normed(part, mean, factor, gain, shift, permutation, first + column, inside)
            size = tl.where(inside, n, 0.0).to(tl.int32, bitcast=True) & 0x7FFFFFFF  # in the order of floats, NaN last
            peak = tl.maximum(peak, tl.max(size, 1)[:, None])
        peak = peak.to(tl.float32, bitcast=True)
        finite = peak < float("inf")
        if scale is None:
            step = tl.div_rn(peak, 127.0 if ROUNDING == "int8" else 448.0)
            step = tl.where(step < SMALLEST, 1.0, step)
        else:
            step = tl.zeros([ROWS, 1], tl.float32) + tl.load(scale)
        store = tl.where(finite, step, float("nan"))
        tl.store(scales + index[:, None], store, mask=there[:, None])

    for start in range(0, longest, BLOCK):
        column = start + tl.arange(0, BLOCK)[None, :]
        inside = there[:, None] & _within(column, own, WHOLE)
        part = s
        if not ONE:
            part = _summed(x_rows, residual_rows, permutation, first + column, inside, x_column, residual_column)
        if kept is not None:
            at = first + column
            if permutation is not None:
                at = tl.load(permutation + at, mask=inside, other=0)
            tl.store(kept + (row * width)[:, None] + at, part.to(kept.dtype.element_ty), mask=inside)
        n = _normed(part, mean, factor, gain, shift, permutation, first + column, inside)
        if ROUNDING != "none":
            ratio = tl.where(finite, n * tl.div_rn(1.0, tl.maximum(step, SMALLEST)), 0.0)
            if ROUNDING == "int8":
                n = _integers(ratio)
            elif y.dtype.element_ty == tl.float8e4nv:  # a chip that converts, and saturates
                n = ratio
            elif y.dtype.element_ty == tl.uint8:
                n = _e4m3_codes(ratio)
            else:
                n = e4m3(_e4m3_codes(ratio), y.dtype.element_ty)
        tl.store(y + (row * width)[:, None] + first + column, n.to(y.dtype.element_ty), mask=inside)


SMALLEST = tl.constexpr(2.0**-126)


@triton.jit
def _within(column, own, WHOLE: tl.constexpr):
    """Whether there is such a column; WHOLE: blocks of columns fill rows, and no column is asked."""
    return tl.full(column.shape, True, tl.int1) if WHOLE else column < own


@triton.jit
def _summed(x_rows, residual_rows, permutation, column, inside, x_column, residual_column):
    """s = x + residual in float32, zero outside."""
    if permutation is not None:
        column = tl.load(permutation + column, mask=inside, other=0)
    s = tl.load(x_rows + column.to(tl.int64) * x_column, mask=inside, other=0.0).to(tl.float32)
    if residual_rows is not None:
        at = residual_rows + column.to(tl.int64) * residual_column
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return s


@triton.jit
def _normed(s, mean, factor, gain, shift, permutation, column, inside):
    n = (s - mean) * factor
    if permutation is not None:
        column = tl.load(permutation + column, mask=inside, other=0)
    if gain is not None:
        n *= tl.load(gain + column, mask=inside, other=0.0).to(tl.float32)
    if shift is not None:
        n += tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)
    return n


@triton.jit
def _integers(ratio):
    """To the nearest of -128..127, ties to even: added to 1.5 * 2^23, a float32 has them in its last byte."""
    ratio = tl.minimum(tl.maximum(ratio, -128.0), 127.0)
    return (ratio + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _e4m3_codes(ratio):
    """The code of the nearest e4m3 number, ties to even, saturated: also on chips that cannot convert.

    From 2^-6 on, e4m3 is a float32 with 20 bits less of fraction and an exponent 120 less; below, a multiple of 2^-9.
    """
    size = tl.minimum(tl.abs(ratio), 448.0)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = ((size * 512.0 + 12582912.0) - 12582912.0).to(tl.int32)
    code = tl.where(size < 0.015625, small, normal)
    return (code | ((ratio.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)
