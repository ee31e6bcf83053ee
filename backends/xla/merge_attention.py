"""Two attention results over disjoint keys made one, in jax.numpy."""

import jax
import jax.numpy as jnp

from ._program import Program, refusals
from ._torch import bucket, filled, to_jax, to_torch

TRAITS = {"deterministic": True, "accumulate": "float32"}


def refuse(out_a, lse_a, out_b, lse_b):
    return refusals("merge_attention", out_a, lse_a, out_b, lse_b)


def plain(out_a, lse_a, out_b, lse_b):
    lse = jnp.logaddexp(lse_a, lse_b)
    parts = []
    for out, part in ((out_a, lse_a), (out_b, lse_b)):
        seen = part > -jnp.inf
        weight = jnp.where(seen, jnp.exp(part - lse), 0)
        parts.append(jnp.where(seen[..., None], weight[..., None] * out.astype("float32"), 0))
    return (parts[0] + parts[1]).astype(out_a.dtype), lse


program = Program(plain)


def run(out_a, lse_a, out_b, lse_b):
    if isinstance(out_a, jax.Array):
        return program(out_a, lse_a, out_b, lse_b)
    tokens = out_a.shape[0]
    arrays = [to_jax(filled(x, bucket(tokens))) for x in (out_a, lse_a, out_b, lse_b)]
    return tuple(x[:tokens] for x in to_torch(program(*arrays)))
