"""A different low-rank adapter for each row, in jax.numpy: every adapter for every row, and only a row's own part kept.

Which rows share an adapter is not known when the program is compiled, so the product with `a` is that with all of them.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ._products import dot
from ._program import Program, refusals
from ._torch import bucket, filled, to_jax, to_torch

TRAITS = {"deterministic": True, "accumulate": "float32"}


def refuse(y, x, a, b, adapters, scales):
    return refusals("lora_gemm", y, x, a, b, adapters, scales)


def plain(y, x, a, b, adapters, scales):
    count, rank, columns = a.shape
    if not count or not rank:
        return y
    own = adapters[:, None] == jnp.arange(count)  # [rows count]
    hidden = dot(x, a.reshape(count * rank, columns)).reshape(-1, count, rank)
    hidden = jnp.where(own[..., None], hidden, 0).reshape(-1, count * rank)
    used = jnp.where(own.any(0)[:, None, None], b, 0)  # an adapter that no row names may hold NaN
    update = dot(hidden, used.transpose(1, 0, 2).reshape(b.shape[1], count * rank))
    update = update * jnp.take(scales, adapters, mode="clip")[:, None]
    updated = (y.astype("float32") + update).astype(y.dtype)
    return _chosen((adapters >= 0)[:, None], updated, y)


def _chosen(where, x, y):
    """jnp.where bit for bit: on a CPU, half precision goes through float32, which changes a NaN's bits."""
    bits = jnp.uint32 if x.dtype.itemsize == 4 else jnp.uint16
    picked = jnp.where(where, lax.bitcast_convert_type(x, bits), lax.bitcast_convert_type(y, bits))
    return lax.bitcast_convert_type(picked, x.dtype)


program = Program(plain)


def run(y, x, a, b, adapters, scales):
    if isinstance(y, jax.Array):
        return program(y, x, a, b, adapters, scales)
    rows, size = y.shape[0], bucket(y.shape[0])
    arrays = [filled(y, size), filled(x, size), a, b, filled(adapters, size, -1), scales]
    y.copy_(to_torch(program(*map(to_jax, arrays)))[:rows])
    return None
