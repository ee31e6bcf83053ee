"""act(norm(x + residual) @ weightT + bias): which kernels, in which tiles.

A norm, a residual, act-order and rounding to 8 bits are one pass over x, by _rows.py, before the product.
Normalising in the product, with 1 / rms in its epilogue, saves that kernel's 2 us and was slower on an H100: with
16 rows 4096 -> 6144 took 39 us against 23, 4096 -> 28672 97 us against 83, for every program repeats the work on x.
"""

import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ._chip import chip_of
from ._dequantize import dequantized, in_bytes
from ._few import multiply_few
from ._launch import INTERPRETED, blocks, computed, launch, power, readable, rounded, rows_of
from ._product import finish, multiply
from ._rows import prepared
from ._tiles import tiles, tiles_few
from ._tuned import choose
from ._weights import Form

GATED = ("swiglu", "geglu")
MANY = 64 if INTERPRETED else 256  # rows from which a weight is unpacked once, not in every tile of rows
LEAST_COLUMNS = 256  # ... where roundings of its numbers average out
FEW = 16  # rows; a tile of matrix instructions has as many
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
    x_scales, factor = None, 1.0
    if columns == 0:  # no scale to read either; bytes, since not every chip has a type for fp8
        form = Form("dense", form.shape, form.values.view(torch.uint8) if form.kind == "fp8" else form.values)
    elif form.rounding or norm != "none" or residual is not None or form.permutation is not None:
        held = _held(form, rows, norm, residual)
        rows, x_scales = prepared(
            rows, norm=norm, gain=gain, shift=shift, residual=residual, eps=eps, keep=kept, rounding=form.rounding,
            group=form.x_group, scale=form.input_scale, permutation=form.permutation, dtype=held,
        )  # fmt: skip
        factor = 4.0 if held == torch.float8_e4m3fnuz else 1.0  # the values of both sides are halved
    if count >= MANY and form.kind != "dense" and columns >= LEAST_COLUMNS:
        if _dense_pays(form, rows.dtype):
            values, scales = dequantized(form, rows.dtype)
            form = Form("dense", form.shape, values, scales)
        elif form.kind == "int4":
            form = in_bytes(form, torch.int8)
        elif rows.dtype == torch.float8_e4m3fnuz:
            form = in_bytes(form, rows.dtype)
    _multiply(
        rows, form, y, x_scales=x_scales, factor=factor, bias=bias, activation=activation, gated=gated,
    )  # fmt: skip
    y = rounded(y, dtype).view(*x.shape[:-1], y.shape[1])
    return y, kept if kept is None else rounded(kept, dtype).view(x.shape)


def _unit(x):
    return x if x.stride(1) == 1 else x.contiguous()


def _describable(*arrays):
    """Whether the tensor memory accelerator of Hopper and later can read them: rows start at multiples of 16 bytes."""
    return all(x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 and 0 not in x.shape for x in arrays)


def _dense_pays(form, dot):
    """Whether one scale, or none, is left to apply after a dense product of what `dot` holds."""
    return dot in (torch.float32, torch.bfloat16, torch.float16) and (form.rounding is None or not form.group)


def _held(form, rows, norm, residual):
    """The dtype of rows made ready: one that the matrix unit multiplies, and that holds rounded values exactly."""
    if form.rounding == "int8":  # half a tile of 32 columns is less than an int8 instruction takes
        return torch.float16 if form.group == 32 and form.kind == "int4" else torch.int8
    if form.rounding == "fp8":
        return (rows.dtype == torch.bfloat16 and _fp8(chip_of(rows))) or torch.float16
    if norm == "none" and residual is not None and rows.dtype == torch.float16:
        return torch.float32  # the sum may be beyond float16
    return rows.dtype


def _fp8(chip):
    """The e4m3 that this chip's matrix unit multiplies, or None.  Its sums are too coarse for more than bfloat16."""
    if chip.arch == "gfx942":
        return torch.float8_e4m3fnuz
    return torch.float8_e4m3fn if chip.fp8 else None


def _multiply(x, form, y, *, x_scales, factor, bias, activation, gated):
    (rows, columns), features, device = x.shape, form.shape[0], x.device
    kind, group, values = form.kind, form.group, form.values
    if values.dtype == torch.float8_e4m3fn and x.dtype != torch.float8_e4m3fn:
        values = values.view(torch.uint8)
    common = {
        "KIND": kind, "DOT": DOT[x.dtype], "GROUP": group, "X_GROUPED": form.x_group > 0, "SCALE_ROWS": form.scale_rows,
        "FACTOR": factor, "ACTIVATION": activation, "GATED": gated, "PTX": _unpacks_in_ptx(form, x.dtype),
    }  # fmt: skip
    known = {"kind": kind, "dot": x.dtype, "group": group}
    if rows <= FEW and (INTERPRETED or x.dtype != torch.float32):
        block_m = 8 if rows <= 8 and not chip_of(x).amd else FEW
        choice = choose(
            "product_few", device,
            tiles_few(block_m, features, columns, kind, x.dtype, group, form.zeros is not None, chip_of(x)),
            **known, rows=block_m, features=features, columns=columns,
        )  # fmt: skip
        choice = choice | {"WIDE": min(choice["WIDE"], group or choice["WIDE"])}
        split, even = choice["SPLIT"], columns % (choice["SLICES"] * choice["WIDE"]) == 0
        parts = torch.empty((split, rows, features), dtype=torch.float32, device=device) if split > 1 else None
        words = form.words is not None and x.dtype != torch.int8 and choice["WIDE"] >= 64  # 16 columns a product
        if words:
            values = form.words
        launch(
            multiply_few, (blocks(features, choice["BLOCK_N"]), split), x,
            x, x_scales, values, form.scales, form.zeros, bias, y, parts,
            rows, features, columns, x.stride(0), values.stride(0),
            EVEN=even, WORDS=words, BLOCK_M=block_m, STAGES=choice["num_stages"], **common, **choice,
        )  # fmt: skip
        _finish(parts, bias, y, activation, gated)
        return
    choice = choose(
        "product", device, tiles(rows, features, columns, kind, x.dtype, group, y.dtype, chip_of(x)),
        **known, rows=power(rows), features=features, columns=columns,
    )  # fmt: skip
    if group and not _foldable(form, x.dtype, columns):
        choice = choice | {"BLOCK_K": min(choice["BLOCK_K"], group)}
    left, right, out = x, values, y
    if choice["TMA"] and _describable(x, values, y):
        block = [choice["BLOCK_N"], choice["BLOCK_K"] // (2 if kind in ("int4", "mxfp4") else 1)]
        if gated:
            values, block = values.view(2, features // 2, -1), [2, block[0] // 2, block[1]]
        left = TensorDescriptor.from_tensor(x, [choice["BLOCK_M"], choice["BLOCK_K"]])
        right = TensorDescriptor.from_tensor(values, block)
        out = TensorDescriptor.from_tensor(y, [choice["BLOCK_M"], choice["BLOCK_N"] // 2])
    else:
        choice = choice | {"TMA": False, "FLAT": 0}
    split = choice["SPLIT"]
    parts = torch.empty((split, rows, features), dtype=torch.float32, device=device) if split > 1 else None
    programs = blocks(rows, choice["BLOCK_M"]) * blocks(features, choice["BLOCK_N"])
    if choice["FLAT"]:
        programs = min(programs, max(1, chip_of(x).processors * choice["FLAT"] // split))
    launch(
        multiply, (programs, split), x,
        left, x_scales, right, form.scales, form.zeros, bias, out, parts,
        rows, features, columns, x.stride(0), values.stride(-2),
        EVEN=columns % choice["BLOCK_K"] == 0, **common, **choice,
    )  # fmt: skip
    _finish(parts, bias, y, activation, gated)


def _finish(parts, bias, y, activation, gated):
    """The sum of parts [SPLIT, rows, features], if there are any, to y."""
    if parts is not None:
        split, rows, features = parts.shape
        launch(
            finish, (blocks(features, 256), rows), y, parts, bias, y, rows, features,
            ACTIVATION=activation, GATED=gated, SPLIT=split, BLOCK_N=256, num_warps=2,
        )  # fmt: skip


def _unpacks_in_ptx(form, dot):
    if not chip_of(form.values).arch.startswith("sm_"):
        return False
    return dot in (torch.bfloat16, torch.float16) or (dot == torch.int8 and form.kind == "int4" and form.zeros is None)


def _foldable(form, dot, columns):
    """Whether scales may go into the weights, rounded to bfloat16: that error averages out over some groups."""
    if dot != torch.bfloat16 or form.zeros is not None:
        return False
    return form.kind == "mxfp4" or (form.kind in ("int4", "int8") and columns >= 32 * form.group)
