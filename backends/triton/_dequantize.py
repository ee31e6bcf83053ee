"""A quantized weight for a call with many rows: unpacked once, instead of in every tile of rows.

    dense[n, k] = (q[n, k] - zero) * scale / top[n]      top[n]: the largest scale of the row, where groups have scales
    bytes[n, k] = q[n, k] - zero                         where x is rounded to 8 bits too, and scales are of groups

dense is rounded to the dtype of x.  The product multiplies by top[n] in float32, so that small and large scales fit
float16.
"""

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ._codes import bytes_, e4m3, nibbles, scales_of
from ._launch import INTERPRETED, blocks, launch
from ._ptx import after_previous


def dequantized(form, dtype):
    """(dense [features, columns] in `dtype`, the scales of its rows [1, features])."""
    tops = form.tops if form.group else form.scales
    return _unpacked(form, form.scales, tops, dtype), tops


def in_bytes(form, dtype):
    """The form with `dtype`, int8 or the chip's own e4m3, for each number; its scales are still to be applied."""
    kind = "int8" if dtype == torch.int8 else "fp8"
    return replace(form, kind=kind, values=_unpacked(form, None, None, dtype), zeros=None, words=None)


def _unpacked(form, scales, tops, dtype):
    features, columns = form.shape
    dense = torch.empty((features, columns), dtype=dtype, device=form.values.device)
    values = form.values.view(torch.uint8) if form.kind == "fp8" else form.values
    block = {"BLOCK_N": 128 if INTERPRETED else 8, "BLOCK_K": 512}
    grid = (blocks(columns, block["BLOCK_K"]), blocks(features, block["BLOCK_N"]))
    launch(
        _dequantize, grid, dense,
        values, scales, form.zeros, tops, dense, features, columns, values.stride(0),
        KIND=form.kind, GROUP=form.group, SCALE_ROWS=form.scale_rows, **block,
    )  # fmt: skip
    return dense


@triton.jit
def _dequantize(
    values, scales, zeros, tops, dense, features, columns, values_row,
    KIND: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """values, scales, zeros: see _product.multiply -> dense [features, columns], contiguous; scales None: bytes."""
    after_previous(CHAINED)
    PACKED: tl.constexpr = KIND == "int4" or KIND == "mxfp4"
    WIDTH: tl.constexpr = BLOCK_K // 2 if PACKED else BLOCK_K
    feature = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (feature < features)[:, None]
    stored = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    held = tl.cdiv(columns, 2) if PACKED else columns
    at = values + (feature.to(tl.int64) * values_row)[:, None] + stored[None, :]
    codes = tl.load(at, mask=there & (stored < held)[None, :], other=0)
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    if PACKED:
        low, high = nibbles(codes, 0, False, KIND, tl.float32), nibbles(codes >> 4, 0, False, KIND, tl.float32)
        number = tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_K))
    else:
        OWN: tl.constexpr = tl.float8e4b8 == dense.dtype.element_ty
        number = e4m3(codes, tl.float8e4b8) if OWN else bytes_(codes, 0, False, KIND, tl.float32, True)
    inside = there & (column < columns)[None, :]
    if GROUP and (scales is not None or zeros is not None):
        SPAN: tl.constexpr = GROUP if GROUP < BLOCK_K else BLOCK_K
        groups = tl.cdiv(columns, GROUP)
        group = tl.program_id(0) * BLOCK_K // GROUP + tl.arange(0, BLOCK_K // SPAN)
        beside = ((feature // SCALE_ROWS).to(tl.int64) * groups)[:, None] + group[None, :]
        held = there & (group < groups)[None, :]
        number = tl.reshape(number, (BLOCK_N, BLOCK_K // SPAN, SPAN))
        if zeros is not None:
            number -= _zeros(zeros, beside, held, KIND)[:, :, None]
        if scales is not None:
            top = tl.load(tops + feature, mask=feature < features, other=1.0)[:, None]
            number *= (scales_of(tl.load(scales + beside, mask=held, other=0), KIND) / top)[:, :, None]
        number = tl.reshape(number, (BLOCK_N, BLOCK_K))
    elif zeros is not None:
        number -= _zeros(zeros, feature[:, None], there, KIND)
    out = dense + (feature.to(tl.int64) * columns)[:, None] + column[None, :]
    tl.store(out, number.to(dense.dtype.element_ty), mask=inside)


@triton.jit
def _zeros(zeros, at, inside, KIND: tl.constexpr):
    """Zero points; what nibbles are less already is taken off."""
    return tl.load(zeros + at, mask=inside, other=0).to(tl.float32) - (8.0 if KIND == "int4" else 0.0)
