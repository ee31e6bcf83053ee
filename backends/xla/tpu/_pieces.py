"""How a kernel goes through the pieces of a block."""

from jax import lax
from jax.experimental import pallas as pl


def in_turns(features, turn, do):
    """do(begin) for each `turn` features, in a loop where there are several."""
    if turn == features:
        do(0)
    else:
        pl.loop(0, features // turn)(lambda i: do(pl.multiple_of(i * turn, turn)))


def after(begin, first, unit):
    """begin + first, a multiple of `unit`, and known to be where it is no constant."""
    return begin + first if isinstance(begin, int) else pl.multiple_of(begin + first, unit)


def for_pieces(rows, features, height, width, do):
    """do(rows, features) for pieces of a block, in a loop: so the registers of one are apart from those of the next."""
    across = features // width
    if rows == height and across == 1:
        do(pl.ds(0, rows), pl.ds(0, features))
        return

    @pl.loop(0, rows // height * across)
    def _(i):
        own = pl.ds(pl.multiple_of(lax.rem(i, across) * width, width), width)
        do(pl.ds(pl.multiple_of(lax.div(i, across) * height, height), height), own)
