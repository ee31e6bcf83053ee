"""Slots of a page in VMEM: tiles of whole registers, of which a token changes its own bits and no other.

A slot is less than what a copy can move: rows of bfloat16 lie in pairs, bytes in fours.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ._numbers import tile_rows


def put(tile, rows, offset):
    """A token's row of every head into a slot of a tile.

    Args:
        tile: ref [heads height dim].
        rows: ref [heads dim], as words_of has them.
    """
    heads, height, dim = tile.shape
    packed, own = _packed(tile.dtype)
    word = lax.broadcasted_iota(jnp.int32, (height // packed, dim), 0)
    here = word == lax.div(offset, packed)
    shift = lax.rem(offset, packed) * (32 // packed)
    kept = jnp.bitwise_not(lax.shift_left(jnp.int32(own), shift))
    for head in range(heads):
        words = pltpu.bitcast(tile[head], jnp.int32)
        new = lax.shift_left(jnp.broadcast_to(rows[pl.ds(head, 1)], words.shape), shift)
        words = jnp.where(here, (words & kept) | new, words)
        tile[head] = pltpu.bitcast(words, tile.dtype)


def clear(block, buffer, begin, end):
    """Zeros in slots outside begin..end of a block, ref [buffers pages heads page_size dim]."""
    pages, kv_heads, page_size, dim = block.shape[1:]
    packed, own = _packed(block.dtype)
    for i in range(pages):

        @pl.when((i * page_size < begin) | ((i + 1) * page_size > end))
        def _(i=i):
            slot = i * page_size + packed * lax.broadcasted_iota(jnp.int32, (page_size // packed, dim), 0)
            kept = jnp.zeros_like(slot)
            for j in range(packed):
                inside = (slot + j >= begin) & (slot + j < end)
                kept |= jnp.where(inside, jnp.int32(own) << (j * 32 // packed), 0)

            @pl.loop(0, kv_heads)
            def _(h):
                words = pltpu.bitcast(block[buffer, i, h], jnp.int32) & kept
                block[buffer, i, h] = pltpu.bitcast(words, block.dtype)


def _packed(dtype):
    """(slots of a row of words, the bits of the first)."""
    packed = 4 // dtype.itemsize
    return packed, -1 if packed == 1 else (1 << 32 // packed) - 1


def words_of(x):
    """The bits of each number in an int32, zeros above."""
    if x.dtype.itemsize == 4:
        return lax.bitcast_convert_type(x, jnp.int32)
    return lax.bitcast_convert_type(x, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint8).astype(jnp.int32)


def height_of(pages):
    """Slots that are read and written together: whole registers of words, or a page that has fewer."""
    rows, page_size = tile_rows(pages.dtype), pages.shape[2]
    return rows if page_size % rows == 0 else page_size
