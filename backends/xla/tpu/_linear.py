"""act(norm(x + residual) @ weightT + bias) on a TPU: what XLA does to x before _product.py multiplies.

XLA fuses a norm, a residual, act-order and rounding into one pass over x.  The row's factor, 1 / rms or the scale of a
rounded row, is not applied there: it commutes with the product, and the kernel's epilogue has it.
"""

from math import prod

import jax.numpy as jnp

from .. import emulated
from .._rounding import STORED, rounded, scaled
from . import _nibbles, _ordered, _w8a8
from ._bytes import rounded_rows
from ._chips import current, interpreter
from ._numbers import LANES, carried, multiplied_as
from ._product import Kind, choose, product

GATED = ("swiglu", "geglu")
LARGEST_SUM = 2**17 - 1  # columns of int8 x int8 that an int32 holds the sum of
BLOCK = 128  # rows that share a scale in fp8_block


def refuse_sum(weight):
    """The refusal of integer sums that int32 cannot hold."""
    scheme = getattr(weight, "scheme", None)
    if scheme and scheme.activation == "int8" and not scheme.group and weight.shape[1] > LARGEST_SUM:
        reason = f"in={weight.shape[1]}; a sum of int8 products in int32 takes at most {LARGEST_SUM}"
        yield "SHAPE", reason, "give the weight a scale for each group of columns"


def linear(
    x, weight, *, norm="none", norm_weight=None, norm_bias=None, residual=None, bias=None, activation="none", eps=0.0,
    return_residual=False,
):  # fmt: skip
    """(y [*rows features, or half of them], x + residual or None), in the dtype of x."""
    dtype, lead, (features, columns) = x.dtype, x.shape[:-1], weight.shape
    kept = None
    if residual is not None:
        x = x.astype(jnp.float32) + residual.astype(jnp.float32)
        kept = x.astype(dtype) if return_residual else None
    out = features // 2 if activation in GATED else features
    if 0 in (*lead, features, columns):  # no sum: act(bias), of no rows or no features nothing
        z = jnp.broadcast_to(0.0 if bias is None else bias.astype(jnp.float32), (*lead, features))
        return _activated_bias(z, activation).astype(dtype), kept
    x, row_scale = normalised(x.reshape(-1, columns), norm, norm_weight, norm_bias, eps)
    scheme, chip = getattr(weight, "scheme", None), current()
    kind = kind_of(scheme, dtype, columns, activation, chip)
    values, scales, zeros = (weight, None, None) if scheme is None else parts(weight)
    rounds = scheme is not None and kind.dot == jnp.int8
    given = weight.input_scale if rounds else None
    blocks, by = _blocks(chip, kind, x.shape[0], x.dtype.itemsize, out, zeros is not None, given is not None)
    rows, x_scales, interpret = x.shape[0], None, interpreter() if emulated() else False
    if rounds and blocks.whole:
        x = x if row_scale is None else x.astype(jnp.float32) * row_scale[:, None]
    if by is _w8a8:
        row_scale = None
    elif rounds and blocks.whole:
        x = jnp.pad(x, ((0, -rows % blocks.m), (0, -columns % LANES)))
        x, row_scale = rounded_rows(x, given, chip=chip, interpret=interpret)
        x, row_scale = x[:rows, :columns], row_scale[:rows]
    elif scheme is not None and scheme.activation:
        x = x.astype(jnp.float32) * (1.0 if row_scale is None else row_scale[:, None])
        to = STORED[scheme.activation]
        ratio, x_scales = scaled(x, to, scheme.activation_group, weight.input_scale)
        x = rounded(ratio, to)
        row_scale, x_scales = (None, x_scales) if scheme.activation_group else (x_scales[:, 0], None)
    if scheme is not None and weight.permutation is not None:  # stored column j belongs to feature permutation[j]
        x = jnp.take(x, weight.permutation, axis=1)
    options = {"bias": bias, "out_dtype": multiplied_as(dtype)}
    options |= {"kind": kind, "blocks": blocks, "interpret": interpret}
    if by is _w8a8:
        y = _w8a8.product(x, values, scales, chip=chip, **options)
    elif by in (_nibbles, _ordered):
        y = by.product(x.astype(kind.dot), values, scales, row_scale=row_scale, **options)
    else:
        options |= {"row_scale": row_scale, "x_scales": x_scales}
        y = product(x.astype(kind.dot), carried(values), scales, zeros, **options)
    return y.astype(dtype).reshape(*lead, out), kept


def normalised(x, norm, gain, shift, eps):
    """(rows, what the sums of each row are still to be multiplied by, or None); rows of float32, or x as it is."""
    if norm == "none":
        return x, None
    n = x.astype(jnp.float32)
    if norm == "layer":
        n = n - n.mean(-1, keepdims=True)
    factor = 1.0 / jnp.sqrt((n * n).mean(-1) + eps)
    if norm == "rms" and gain is None:
        return x, factor
    n = n if gain is None else n * gain.astype(jnp.float32)
    return (n, factor) if shift is None else (n * factor[:, None] + shift.astype(jnp.float32), None)


def kind_of(scheme, dtype, columns, activation, chip):
    """What the kernel must know of the call: above all what it multiplies."""
    dot = multiplied_as(dtype)
    if scheme is not None and scheme.activation == "int8":
        dot = jnp.int8 if chip.int8 else jnp.bfloat16  # which holds them, and their products, exactly
    elif scheme is not None and scheme.activation == "fp8":
        dot = jnp.float8_e4m3fn if chip.fp8 else jnp.bfloat16
    return Kind(
        weight="dense" if scheme is None else scheme.weight,
        dot=jnp.dtype(dot),
        group=0 if scheme is None else scheme.group,
        activation=activation,
        parts=2 if activation in GATED else 1,
        columns=columns,
        apart=scheme is not None and bool(scheme.activation),
    )


def parts(weight):
    """(values as stored, scales float32 [out groups], zeros [out groups], of int4 uint8, else float32, or None)."""
    scheme, scales, zeros = weight.scheme, weight.scales, weight.zeros
    if scheme.weight == "mxfp4":  # the kernel has twice the numbers
        scales = jnp.exp2(scales.astype(jnp.float32) - 128)
    elif scheme.granularity == "block":
        scales = jnp.repeat(scales, BLOCK, axis=0)[: weight.shape[0]]
    elif scheme.granularity == "tensor":
        scales = jnp.broadcast_to(scales, (weight.shape[0], 1))
    if zeros is not None and scheme.weight != "int4":
        zeros = zeros.astype(jnp.float32)
    return weight.values, scales.astype(jnp.float32), zeros


def _blocks(chip, kind, rows, size, features, zeros, given):
    """(sizes of blocks, the module whose product takes them: None for _product.py).

    Args:
        size: bytes of a number of x.
        given: whether the scale of x is.
    """
    sizes = {"rows": rows, "features": features, "columns": kind.columns, "kind": kind}
    if _nibbles.takes(chip, kind, rows, zeros):
        return _nibbles.choose(chip, **sizes), _nibbles
    blocks = choose(chip, **sizes, zeros=zeros)
    if zeros or given:
        return blocks, None
    if (rounding := _w8a8.choose(chip, blocks, kind=kind, features=features, size=size)) is not None:
        return rounding, _w8a8
    ordering = _ordered.choose(chip, blocks, kind=kind, features=features)
    return (blocks, None) if ordering is None else (ordering, _ordered)


def _activated_bias(z, activation):
    from ._product import activated

    return activated(jnp.split(z, 2, -1) if activation in GATED else [z], activation)


def plan(x, weight, *, activation="none", **options):
    """What the cost model chose, in words, for `explain`."""
    chip, scheme = current(), getattr(weight, "scheme", None)
    kind = kind_of(scheme, x.dtype, max(1, weight.shape[1]), activation, chip)
    rows, features = max(1, prod(x.shape[:-1])), max(1, weight.shape[0] // kind.parts)
    given = scheme is not None and weight.input_scale is not None
    size = multiplied_as(x.dtype).itemsize
    b, _ = _blocks(chip, kind, rows, size, features, scheme is not None and not scheme.symmetric, given)
    words = f"blocks of {b.m} rows x {b.n} features x {b.k} columns in {kind.dot}, {b.run} columns at once"
    return f"{words}, {b.vmem >> 10} KiB of VMEM on {chip.name}"
