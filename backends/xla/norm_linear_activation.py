"""act(norm(x + residual) @ wT + bias) in jax.numpy, one program."""

import jax
import jax.numpy as jnp

from ._products import product
from ._program import Program, refusals
from ._torch import over_rows
from ._weight import Weight

TRAITS = {"deterministic": True, "accumulate": "float32"}
ACTIVATIONS = {
    "none": lambda z: z,
    "silu": jax.nn.silu,
    "gelu": lambda z: jax.nn.gelu(z, approximate=False),
    "gelu_tanh": lambda z: jax.nn.gelu(z, approximate=True),
    "relu": jax.nn.relu,
    "swiglu": jax.nn.silu,  # of the gate
    "geglu": lambda z: jax.nn.gelu(z, approximate=False),
}


def refuse(x, weight, **options):
    return refusals("norm_linear_activation", x, weight, **options)


def plain(x, weight, *, norm, norm_weight, norm_bias, residual, bias, activation, eps, return_residual):
    s = x.astype("float32") if residual is None else x.astype("float32") + residual.astype("float32")
    n = s - s.mean(-1, keepdims=True) if norm == "layer" else s
    if norm != "none":
        n = n / jnp.sqrt((n * n).mean(-1, keepdims=True) + float(eps))
    n = n if norm_weight is None else n * norm_weight.astype("float32")
    n = n if norm_bias is None else n + norm_bias.astype("float32")
    z = product(n, weight)
    z = z if bias is None else z + bias.astype("float32")
    gate, *gated = jnp.split(z, 2, -1) if activation in ("swiglu", "geglu") else (z,)
    y = ACTIVATIONS[activation](gate)
    y = (y * gated[0] if gated else y).astype(x.dtype)
    return (y, s.astype(x.dtype)) if return_residual else y


program = Program(plain)


def run(x, weight, **options):
    if isinstance(x, jax.Array):
        return program(x, Weight.of(weight) if hasattr(weight, "scheme") else weight, **options)
    return over_rows(program, x, weight, beside=("residual",), **options)
