"""Rotary position embedding on a TPU: q and k as they lie, each pair of channels met by turning the lanes (_rows.py).

XLA parts a head into its halves, [tokens heads 2 half], which moves all of q and k in memory before and after.  Here
x turned by `half` lanes stands beside x, and tables of cos and sin have a column for every channel:

    y = x * [c c 1] + turned * [-s s 0]
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._chips import current
from ._numbers import LANES, SUBLANES, carried, converted, multiplied_as
from ._rows import choose, over_rows, refuse_long
from ._rows import pays as large
from ._tiles import power

LIVE = 3  # x, x turned, the answer

__all__ = ["pays", "plan", "run", "takes"]


def takes(q, k, cos, sin, positions, *, interleaved):
    """Yield (code, reason, fix) for what the kernel does not take."""
    if 0 in q.shape or 0 in k.shape or 0 in cos.shape:
        reason = f"q is {list(q.shape)}, k is {list(k.shape)}, cos is {list(cos.shape)}; a grid needs a token"
        yield "SHAPE", reason, "give at least one token and one pair of channels"
        return
    yield from refuse_long(SUBLANES, *[(x.shape[1:], jnp.float32) for x in (q, k)] * 2)


def pays(q, k, cos, sin, positions, *, interleaved):
    return large(q)


def run(q, k, cos, sin, positions, *, interleaved):
    dim, half = q.shape[2], cos.shape[1]
    width, out = -(-dim // LANES) * LANES, multiplied_as(q.dtype)
    step = 1 if interleaved else half

    def turned(x, lane):
        """The other channel of each pair."""
        first = lane % 2 == 0 if interleaved else lane < half
        return jnp.where(first, pltpu.roll(x, width - step, 1), pltpu.roll(x, step, 1))

    def body(at, q, k, cos, sin, *results):
        def turn(token):
            own = pl.ds(token, 1)
            for x, y in zip((q, k), results, strict=True):
                value = converted(x[token], jnp.float32)  # [heads width]
                lane = lax.broadcasted_iota(jnp.int32, value.shape, 1)
                new = value * cos[own, :] + turned(value, lane) * sin[own, :]
                y[token] = jnp.where(lane < 2 * half, new, value).astype(y.dtype)

        together = at_once(sum(x.shape[1] * x.shape[2] for x in (q, k)))

        @pl.loop(0, SUBLANES // together)
        def _(i):
            for j in range(together):
                turn(at.start + i * together + j)

    rows = [jnp.take(table.astype(jnp.float32), positions, axis=0, mode="clip") for table in (cos, sin)]
    tables = [spread(t, width, interleaved, sign) for t, sign in zip(rows, (1, -1), strict=True)]
    heads = [carried(jnp.pad(x, ((0, 0), (0, 0), (0, width - dim)))) for x in (q, k)]
    results = over_rows(
        body, [*heads, *tables], [((x.shape[1], width), out) for x in heads], name="rotary_embedding", strip=SUBLANES
    )
    return tuple(y[..., :dim].astype(q.dtype) for y in results)


def at_once(numbers):
    """Tokens of so many float32 numbers whose schedules may overlap: each takes registers for LIVE times its own."""
    return power(max(1, min(SUBLANES, current().registers * SUBLANES * LANES // (LIVE * numbers))) + 1) // 2


def spread(table, width, interleaved, sign):
    """[tokens half] -> [tokens width]: a column for each channel, the first of a pair times `sign`."""
    pairs = jnp.stack([sign * table, table], -1 if interleaved else 1).reshape(table.shape[0], -1)
    return jnp.pad(pairs, ((0, 0), (0, width - pairs.shape[1])))


def plan(q, k, cos, sin, positions, **options):
    """What the cost model chose, in words, for `explain`."""
    width = -(-q.shape[2] // LANES) * LANES
    heads = [((x.shape[0], x.shape[1], width), x.dtype) for x in (q, k)]
    return str(choose([*heads, *heads, *[((q.shape[0], width), jnp.float32)] * 2], SUBLANES))
