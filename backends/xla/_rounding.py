"""How numbers become 8 bits: llmkernels/quant/activation.py has the rules."""

import jax.numpy as jnp
from jax import lax

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
LOWEST = {"int8": -128.0, "float8_e4m3fn": -448.0, "float8_e5m2": -57344.0}
SMALLEST = 2.0**-126  # the smallest normal float32
STORED = {"int8": "int8", "fp8": "float8_e4m3fn"}
_FP8 = {"float8_e4m3fn": (3, -6), "float8_e5m2": (2, -14)}  # bits of the fraction, exponent of the smallest normal


def scaled(x, dtype, group=0, scale=None):
    """(x / scale, saturated and not rounded [*rows hidden], scales [*rows groups]), of float32 x."""
    hidden = x.shape[-1]
    width = min(group or hidden, hidden) or 1
    groups = -(-hidden // width) if group else 1
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * width - hidden)])
    grouped = padded.reshape(*x.shape[:-1], groups, width)
    peak = jnp.abs(grouped).max(-1)
    if scale is None:
        scales = peak / LARGEST[dtype]
        scales = jnp.where(scales < SMALLEST, 1, scales)
    else:
        scales = jnp.broadcast_to(scale.reshape(()), peak.shape)
    finite = jnp.isfinite(peak)
    scales = jnp.where(finite, scales, jnp.nan)
    ratio = jnp.where(finite[..., None], grouped / scales[..., None], 0)
    return jnp.clip(ratio, LOWEST[dtype], LARGEST[dtype]).reshape(padded.shape)[..., :hidden], scales


def rounded(x, dtype):
    """Saturated float32 x rounded to what `dtype` can hold, ties to even, still in float32.

    Not by a cast to FP8 and back: XLA may drop such a pair, and its CPU cast goes through float16, which rounds twice.
    """
    if dtype == "int8":
        return jnp.round(x)
    fraction, lowest = _FP8[dtype]
    exponent = (lax.bitcast_convert_type(x, jnp.int32) >> 23 & 255) - 127
    step = jnp.maximum(exponent, lowest) - fraction  # neighbours of x differ by 2 ** step
    unit = lax.bitcast_convert_type((step + 127) << 23, jnp.float32)
    return jnp.round(x / unit) * unit


def stored(x, dtype):
    """Saturated float32 x in `dtype`; NaN as torch writes it, all bits set, so that caches are equal byte for byte."""
    values = rounded(x, dtype).astype(dtype)
    if dtype != "float8_e5m2":
        return values
    bits = lax.bitcast_convert_type(values, jnp.uint8)
    return lax.bitcast_convert_type(jnp.where(jnp.isnan(x), bits | 3, bits), values.dtype)


def seen_through(x, scheme, input_scale):
    """float32 x as a product of this scheme sees it: (values, factor [*rows 1] or None), values * factor."""
    if scheme.activation is None:
        return x, None
    dtype, group = STORED[scheme.activation], scheme.activation_group
    ratio, scales = scaled(x, dtype, group, input_scale)
    values = rounded(ratio, dtype)
    return (values * spread(scales, group, x.shape[-1]), None) if group else (values, scales)


def spread(per_group, group, columns):
    """[..., groups] -> [..., columns]: each value for the columns of its group."""
    return jnp.repeat(per_group, group, axis=-1)[..., :columns]
