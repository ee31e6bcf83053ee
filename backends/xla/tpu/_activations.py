"""Activations of a product's epilogue, in float32."""

import jax.numpy as jnp
from jax import lax


def activated(z, activation):
    """act(z[0]), times z[1] of a gated one; float32."""
    value = ACTIVATIONS[activation](z[0])
    return value * z[1] if len(z) > 1 else value


def _gelu(z):
    return 0.5 * z * (1.0 + lax.erf(z * 0.5**0.5))


def _gelu_tanh(z):
    return 0.5 * z * (1.0 + jnp.tanh((2 / jnp.pi) ** 0.5 * (z + 0.044715 * z * z * z)))


ACTIVATIONS = {
    "none": lambda z: z,
    "silu": lambda z: z / (1.0 + jnp.exp(-z)),
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda z: jnp.where(z < 0, 0.0, z),
    "swiglu": lambda z: z / (1.0 + jnp.exp(-z)),
    "geglu": _gelu,
}
