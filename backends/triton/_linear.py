"""act(norm(x + residual) @ weightT + bias): which kernels, in which tiles.

Few rows are read by every program anyway, and each makes them ready as it goes: residual, gain, sum of squares.  Many
rows, rounded ones, LayerNorm (whose mean must be known before anything is rounded) and float16 (which x + residual and a
gain may overflow before the row is normalised) are made ready once, by _rows.py.
"""

import functools

import torch
import triton
import triton.language as tl

from ._dequantize import dequantized
from ._launch import INTERPRETED, computed, launch, power, readable, rounded, rows_of
from ._product import finish, multiply
from ._rows import prepared
from ._tuned import choose
from ._weights import Form

GATED = ("swiglu", "geglu")
MANY = 16 if INTERPRETED else 128  # rows from which a weight is unpacked once, not in every tile of rows
LEAST_COLUMNS = 256  # ... where roundings of its numbers average out
FEW = 16  # rows; a tile of matrix instructions has as many
WAVES = 4  # programs a multiprocessor should have in flight, where bytes are what takes time
LARGEST_SUM = 2**17 - 1  # columns of int8 x int8 that an int32 holds the sum of
FP8 = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e4m3fnuz: tl.float8e4b8}
DOT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.int8: tl.int8} | FP8


def refuse_sum(weight):
    """The refusal of integer sums that int32 cannot hold."""
    scheme = getattr(weight, "scheme", None)
    if scheme and scheme.activation == "int8" and not scheme.group and weight.shape[1] > LARGEST_SUM:
        reason = f"in={weight.shape[1]}; a sum of int8 products in int32 takes at most {LARGEST_SUM}"
        yield "SHAPE", reason, "give the weight a scale for each group of columns"


def linear(
    x, form, *, norm="none", gain=None, shift=None, residual=None, bias=None, activation="none", eps=0.0,
    return_residual=False,
):  # fmt: skip
    """(y [*rows, features or half of them], x + residual or None), in the dtype of x."""
    dtype, (features, columns) = x.dtype, form.shape
    gated = activation in GATED
    rows = _unit(readable(rows_of(x)))
    residual = None if residual is None else _unit(readable(rows_of(residual)))
    gain, shift, bias = (readable(part) for part in (gain, shift, bias))
    count = rows.shape[0]
    y = torch.empty((count, features // 2 if gated else features), dtype=computed(dtype), device=x.device)
    kept = torch.empty(rows.shape, dtype=computed(dtype), device=x.device) if return_residual else None
    x_scales, permutation, factor = None, form.permutation, 1.0
    product = {"residual": residual, "gain": gain, "kept": kept, "norm": norm, "eps": eps}
    if columns == 0:  # no scale to read either
        form, permutation, product = Form("dense", form.shape, form.values), None, {"norm": "none", "eps": eps}
    elif form.rounding or not _on_the_way(rows, features, norm, gain, residual, permutation):
        held = _held(form, rows, norm, residual)
        rows, x_scales = prepared(
            rows, norm=norm, gain=gain, shift=shift, residual=residual, eps=eps, keep=kept, rounding=form.rounding,
            group=form.x_group, scale=form.input_scale, permutation=permutation, dtype=held,
        )  # fmt: skip
        permutation, product = None, {"norm": "none", "eps": eps}
        factor = 4.0 if held == torch.float8_e4m3fnuz else 1.0  # the values of both sides are halved
    if count >= MANY and form.kind != "dense" and columns >= LEAST_COLUMNS and _dense_pays(form, rows.dtype):
        values, scales = dequantized(form, rows.dtype)
        form = Form("dense", form.shape, values, scales)
    _multiply(
        rows, form, y, x_scales=x_scales, permutation=permutation, factor=factor, bias=bias,
        activation=activation, gated=gated, dtype=dtype, **product,
    )  # fmt: skip
    y = rounded(y, dtype).view(*x.shape[:-1], y.shape[1])
    return y, kept if kept is None else rounded(kept, dtype).view(x.shape)


def _unit(x):
    return x if x.stride(1) == 1 else x.contiguous()


def _on_the_way(rows, features, norm, gain, residual, permutation):
    """Whether programs make rows ready themselves."""
    plain = gain is None and residual is None
    if norm == "none" and plain and permutation is None:
        return True
    if norm == "layer" or (not plain and (rows.dtype == torch.float16 or permutation is not None)):
        return False
    return rows.shape[0] <= FEW and features > 0


def _dense_pays(form, dot):
    """Whether one scale, or none, is left to apply after a dense product of what `dot` holds."""
    return dot in (torch.float32, torch.bfloat16, torch.float16) and (form.rounding is None or not form.group)


def _held(form, rows, norm, residual):
    """The dtype of rows made ready: what the matrix unit multiplies, and holds their values exactly if they are rounded."""
    if form.rounding == "int8":  # half a tile of 32 columns is less than an int8 instruction takes
        return torch.float16 if form.group == 32 and form.kind == "int4" else torch.int8
    if form.rounding == "fp8":
        return (rows.dtype == torch.bfloat16 and _fp8(rows.device.index)) or torch.float16
    if norm == "none" and residual is not None and rows.dtype == torch.float16:
        return torch.float32  # the sum may be beyond float16
    return rows.dtype


@functools.cache
def _fp8(index):
    """The e4m3 that this GPU's matrix unit multiplies, or None.  Its sums are too coarse for wider outputs than bfloat16."""
    if torch.version.hip:
        chip = torch.cuda.get_device_properties(index).gcnArchName.partition(":")[0]
        if chip == "gfx942":
            return torch.float8_e4m3fnuz
        return torch.float8_e4m3fn if chip == "gfx950" or chip.startswith("gfx12") else None
    return torch.float8_e4m3fn if torch.cuda.get_device_capability(index) >= (8, 9) else None


@functools.cache
def _processors(index):
    return 4 if INTERPRETED else torch.cuda.get_device_properties(index).multi_processor_count


def _multiply(
    x, form, y, *, x_scales, permutation, factor, bias, activation, gated, dtype, norm, eps, residual=None,
    gain=None, kept=None,
):  # fmt: skip
    (rows, columns), (features, _), device = x.shape, form.shape, x.device
    kind = form.kind
    group = form.group
    values = form.values
    if kind == "fp8" and x.dtype != torch.float8_e4m3fn:
        values = values.view(torch.uint8)
    heuristic = _tiles(rows, features, columns, kind, x.dtype, group, _processors(device.index))
    tiles = choose(
        "product", device, heuristic, kind=kind, dot=x.dtype, group=group, rows=power(rows), features=features,
        columns=columns,
    )  # fmt: skip
    if group and not _foldable(form, x.dtype, columns):
        tiles = tiles | {"BLOCK_K": min(tiles["BLOCK_K"], group)}
    split = tiles["SPLIT"]
    parts = squares = None
    if split > 1:
        parts = torch.empty((split, rows, features), dtype=torch.float32, device=device)
        squares = torch.empty((split, rows), dtype=torch.float32, device=device) if norm == "rms" else None
    grid = (triton.cdiv(rows, tiles["BLOCK_M"]) * triton.cdiv(features, tiles["BLOCK_N"]), split)
    launch(
        multiply, grid, x,
        x, residual, gain, permutation, x_scales, values, form.scales, form.zeros, bias, y, kept, parts, squares,
        rows, features, columns, x.stride(0), 0 if residual is None else residual.stride(0), values.stride(0), eps,
        KIND=kind, DOT=DOT[x.dtype], GROUP=group, X_GROUPED=form.x_group > 0, SCALE_ROWS=form.scale_rows,
        FACTOR=factor, NORM=norm, ACTIVATION=activation, GATED=gated, EVEN=columns % tiles["BLOCK_K"] == 0,
        PTX=not INTERPRETED and not torch.version.hip and x.dtype in (torch.bfloat16, torch.float16), **tiles,
    )  # fmt: skip
    if split > 1:
        launch(
            finish, (triton.cdiv(features, 256), rows), x,
            parts, squares, bias, y, rows, features, columns, eps,
            NORM=norm, ACTIVATION=activation, GATED=gated, SPLIT=split, BLOCK_N=256, num_warps=2,
        )  # fmt: skip


def _foldable(form, dot, columns):
    """Whether scales may go into the weights, rounded to bfloat16: that error averages out over some groups."""
    if dot != torch.bfloat16 or form.zeros is not None:
        return False
    return form.kind == "mxfp4" or (form.kind in ("int4", "int8") and columns >= 32 * form.group)


def _tiles(rows, features, columns, kind, dot, group, processors):
    """Tile sizes for a kind of call."""
    if INTERPRETED:
        block_m, block_n, block_k = power(rows, 16, 64), power(features, 32, 256), 128
        warps, stages, band, wanted = 4, 2, 8, 2
    elif dot == torch.float32:  # multiplied and added one by one: small tiles, or registers spill
        block_m, block_n, block_k, warps, stages, band, wanted = 16, 64, 32, 4, 2, 8, processors
    elif rows <= 64:
        block_m, block_n, block_k = power(rows, 16), 64, 128
        warps, stages, band, wanted = 4, 4, 1, WAVES * processors
    else:
        block_m, block_n, block_k, warps, stages, band, wanted = 128, 128, 64, 8, 3, 8, processors
    tiles = triton.cdiv(rows, block_m) * triton.cdiv(features, block_n)
    passes = triton.cdiv(columns, block_k)
    split = 1
    while 2 * split * tiles <= wanted and 4 * split <= passes and split < 16:
        split *= 2
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "BAND": band, "SPLIT": split,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
