"""The next token of each row in jax.numpy: one sort where top-k or top-p asks for it, one cumulative sum."""

import jax
import jax.numpy as jnp

from ._program import Program, refusals
from ._torch import bucket, filled, to_jax, to_torch

TRAITS = {"deterministic": True, "accumulate": "float32"}


def refuse(logits, uniform, *, temperature, top_k, top_p, min_p):
    return refusals("sample", logits, uniform, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def plain(logits, uniform, *, temperature=None, top_k=None, top_p=None, min_p=None):
    rows, vocab = logits.shape
    if not rows or not vocab:
        return jnp.zeros(rows, int)
    wide = logits.astype("float32")
    scores = wide - wide.max(-1, keepdims=True)
    divisor = 1 if temperature is None else jnp.where(temperature == 0, 1, temperature)[:, None]
    mass = jnp.where(_kept(scores, divisor, top_k, top_p), jnp.exp(scores / divisor), 0)
    if min_p is not None:
        mass = jnp.where(mass >= min_p[:, None], mass, 0)
    upto, ids = jnp.cumsum(mass, -1), jnp.arange(vocab)
    drawn = (upto <= uniform[:, None] * upto[:, -1:]).sum(-1)
    tokens = jnp.minimum(drawn, jnp.where(mass > 0, ids, 0).max(-1))  # rounding may reach past the last one
    if temperature is None:
        return tokens.astype(int)
    greedy = jnp.where(scores == 0, ids, vocab).min(-1)
    return jnp.where(temperature == 0, greedy, tokens).astype(int)


def _kept(scores, divisor, top_k, top_p):
    """[rows vocab] bool: what top-k and then top-p keep.  Tokens that tie at a boundary stay together.

    Scores are compared before they are divided: a large temperature makes them subnormal, and XLA flushes those to 0.
    """
    kept = jnp.ones(scores.shape, bool)
    if top_k is None and top_p is None:
        return kept
    vocab, falling = scores.shape[1], -jnp.sort(-scores, -1)
    if top_k is not None:
        count = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
        lowest = jnp.take_along_axis(falling, count[:, None] - 1, -1)
        kept &= scores >= lowest
        falling = jnp.where(falling < lowest, -jnp.inf, falling)
    if top_p is not None:
        mass = jnp.exp(falling / divisor)
        above = jnp.cumsum(mass, -1) - mass
        inside = (above < top_p[:, None] * mass.sum(-1, keepdims=True)).sum(-1)
        count = jnp.maximum(jnp.where(top_p < 1, inside, vocab), 1)
        kept &= scores >= jnp.take_along_axis(falling, count[:, None] - 1, -1)
    return kept


program = Program(plain)


def run(logits, uniform, **options):
    if isinstance(logits, jax.Array):
        return program(logits, uniform, **options)
    rows, size = logits.shape[0], bucket(logits.shape[0])
    given = {name: to_jax(filled(x, size)) for name, x in options.items() if x is not None}
    return to_torch(program(to_jax(filled(logits, size)), to_jax(filled(uniform, size)), **given))[:rows].long()
