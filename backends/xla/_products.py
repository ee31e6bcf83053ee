"""x @ wT in float32, for dense and quantized weights."""

import jax.numpy as jnp
from jax import lax

from ._rounding import seen_through, spread

BLOCK = 128  # rows and columns that share a scale in fp8_block
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dot(x, w):
    """x [*rows in] @ w [out in]T in float32, whatever the device would make of it by default."""
    contracted = ((x.ndim - 1,), (1,)), ((), ())
    return lax.dot_general(x.astype("float32"), w.astype("float32"), contracted, precision=lax.Precision.HIGHEST)


def product(x, weight):
    """float32 x [*rows in] @ weightT, as quantized_gemm's contract says: x is rounded where the scheme rounds it."""
    if not hasattr(weight, "scheme"):
        return dot(x, weight)
    if 0 in weight.shape:  # no sums, or none of anything
        return jnp.zeros((*x.shape[:-1], weight.shape[0]), "float32")
    values, factor = seen_through(x, weight.scheme, weight.input_scale)
    if weight.permutation is not None:  # stored column j belongs to feature permutation[j]
        values = jnp.take(values, weight.permutation, axis=-1)
    y = dot(values, levels(weight) * _scales(weight)) if _groups(weight) else dot(values, levels(weight))
    y = y if _groups(weight) else y * weight.scales.astype("float32").reshape(-1)
    return y if factor is None else y * factor


def levels(weight):
    """q - zeros, float32 [out in], in the order in which columns are stored."""
    kind, columns = weight.scheme.weight, weight.shape[1]
    values = weight.values
    if weight.scheme.packed:
        values = jnp.stack([values & 15, values >> 4], -1).reshape(values.shape[0], -1)[:, :columns]
    if kind == "mxfp4":
        return jnp.array([*E2M1, *(-value for value in E2M1)], "float32")[values]
    q = values.astype("float32")
    if weight.zeros is not None:
        return q - _of_columns(weight, weight.zeros.astype("float32"))
    return q - 8 if kind == "int4" else q


def _groups(weight):
    """Whether the columns of a row have more than one scale."""
    return weight.scheme.granularity in ("group", "block")


def _scales(weight):
    """float32 [out in]."""
    scales = weight.scales
    if weight.scheme.weight == "mxfp4":  # 2 ** (e - 127) as two exact factors: 2 ** -127 is below the normal numbers
        half = (scales.astype("int32") - 127) >> 1
        rest = scales.astype("int32") - 127 - half
        return _of_columns(weight, _power(half)) * _of_columns(weight, _power(rest))
    if weight.scheme.granularity == "block":
        scales = jnp.repeat(scales, BLOCK, axis=0)[: weight.shape[0]]
    return _of_columns(weight, scales.astype("float32"))


def _power(exponent):
    """2 ** exponent, exactly; exponents of normal float32 numbers."""
    return lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _of_columns(weight, per_group):
    return spread(per_group, weight.scheme.group, weight.shape[1]) if weight.scheme.group else per_group
