"""Rotary position embedding in jax.numpy."""

import jax
import jax.numpy as jnp

from ._program import Program, refusals
from ._torch import bucket, filled, narrow, to_jax, to_torch

TRAITS = {"deterministic": True, "accumulate": "float32"}


def refuse(q, k, cos, sin, positions, *, interleaved):
    return refusals("rotary_embedding", q, k, cos, sin, positions, interleaved=interleaved)


def plain(q, k, cos, sin, positions, *, interleaved=False):
    half = cos.shape[1]
    c, s = (jnp.take(table, positions, axis=0, mode="clip")[:, None] for table in (cos, sin))
    results = []
    for x in (q, k):
        wide, rest = x[..., : 2 * half].astype("float32"), x[..., 2 * half :]
        pairs = wide.reshape(*x.shape[:-1], half, 2) if interleaved else wide.reshape(*x.shape[:-1], 2, half)
        a, b = (pairs[..., 0], pairs[..., 1]) if interleaved else (pairs[..., 0, :], pairs[..., 1, :])
        turned = jnp.stack([a * c - b * s, b * c + a * s], -1 if interleaved else -2)
        results.append(jnp.concatenate([turned.reshape(wide.shape).astype(x.dtype), rest], -1))
    return tuple(results)


program = Program(plain)


def run(q, k, cos, sin, positions, *, interleaved=False):
    if isinstance(q, jax.Array):
        return program(q, k, cos, sin, positions, interleaved=interleaved)
    tokens, size = q.shape[0], bucket(q.shape[0])
    positions = narrow(positions.clamp(0, max(cos.shape[0] - 1, 0)))  # what is not checked must not wrap around
    arrays = [filled(q, size), filled(k, size), cos, sin, filled(positions, size)]
    return tuple(x[:tokens] for x in to_torch(program(*map(to_jax, arrays), interleaved=interleaved)))
