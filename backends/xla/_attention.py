"""Ragged attention over pages in jax.numpy: blocks of queries, and a loop over chunks of keys with a running softmax.

Queries are cut into blocks of one sequence each.  A batch of `tokens` tokens and `seqs` sequences has at most
tokens // width + seqs blocks of `width` queries, whatever the lengths are: that is what the program is compiled for.
All blocks go through their own keys together, a chunk of pages at a time, until the longest has ended; the number of
rounds is computed on the device, so that one program serves all lengths.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

CHUNK = 128  # keys of a round, or one page where that is longer
PART = 128  # channels that are summed at a time: a CPU adds them one after the other, and 256 in a row round too often
WIDEST = 64  # queries of a block


class Blocks(NamedTuple):
    """Of each block: its sequence, the row of its first query in q, how many queries it has; int32 [blocks].

    position: where its first query stands in the sequence.  length: keys of the sequence, new ones included; 0 where
    the block is empty.  new: new tokens of the sequence.
    """

    sequence: Any
    first: Any
    count: Any
    position: Any
    length: Any
    new: Any


def width_of(tokens, seqs):
    """Queries of a block: about as many as a sequence has new tokens, a power of two."""
    average = max(tokens, 1) // max(seqs, 1)
    return min(1 << max(average - 1, 0).bit_length(), WIDEST)


def cut(starts, lengths, tokens, width):
    """Blocks of `width` queries, and for each token its block and its place in it: int32 [tokens] each."""
    seqs, new = lengths.shape[0], jnp.diff(starts)
    ends = jnp.cumsum(-(-new // width))  # blocks of all sequences up to this one
    block = jnp.arange(tokens if width == 1 else tokens // width + seqs)
    sequence = jnp.minimum(jnp.searchsorted(ends, block, side="right", method="compare_all"), seqs - 1)
    before = (ends - -(-new // width))[sequence]
    offset = (block - before) * width
    count = jnp.where(block < ends[-1], jnp.clip(new[sequence] - offset, 0, width), 0)
    length = jnp.where((count > 0) & (lengths[sequence] > 0), lengths[sequence], 0)
    position = lengths[sequence] - new[sequence] + offset
    blocks = Blocks(sequence, starts[sequence] + offset, count, position, length, new[sequence])
    token = jnp.arange(tokens)
    owner = jnp.clip(jnp.searchsorted(starts, token, side="right", method="compare_all") - 1, 0, seqs - 1)
    within = token - starts[owner]
    return blocks, (ends - -(-new // width))[owner] + within // width, within % width


def attend(q, k_cache, v_cache, table, blocks, width, *, causal, window, soft_cap, sinks, slopes, tree):
    """float32 out [blocks kv_heads group width v_dim] and lse [blocks kv_heads group width].

    q: float32 [blocks kv_heads group width dim], scaled; where a query is missing it may be anything.
    tree: uint32 [blocks width words], or None.
    """
    count, kv_heads, group = q.shape[:3]
    pages, page_size, _, v_dim = v_cache.shape
    step = max(1, CHUNK // page_size)  # pages of a round
    row = blocks.position[:, None] + jnp.arange(width)  # where each query stands [blocks width]
    present = jnp.arange(width) < blocks.count[:, None]
    left, right = window
    first_page = jnp.maximum(blocks.position - left, 0) // page_size if left >= 0 else jnp.zeros(count, "int32")
    last_key = blocks.length
    if tree is None and (causal or right >= 0):  # no query of the block sees further
        reach = 0 if causal else right
        last_key = jnp.minimum(last_key, blocks.position + blocks.count + reach)
    rounds = jnp.max(-(-(last_key - first_page * page_size) // (step * page_size)), initial=0)

    parts = [slice(begin, begin + PART) for begin in range(0, q.shape[-1], PART)]

    def attend_chunk(turn, state):
        m, total, out = state
        entry = first_page[:, None] + turn * step + jnp.arange(step)  # [blocks step]
        page = table[blocks.sequence[:, None], jnp.minimum(entry, table.shape[1] - 1)]
        page = jnp.clip(page, 0, pages - 1)  # entries that no query needs may hold anything
        k, v = (_keys(cache, page) for cache in (k_cache, v_cache))  # [blocks keys kv_heads dim]
        key = (entry[..., None] * page_size + jnp.arange(page_size)).reshape(count, 1, -1)  # [blocks 1 keys]
        seen = _seen(key, row[..., None], blocks, causal, left, right, tree) & present[..., None]  # [blocks width keys]
        scores = sum(jnp.einsum("bhgqd,bkhd->bhgqk", q[..., p], k[..., p], precision="highest") for p in parts)
        if soft_cap:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        if slopes is not None:
            distance = (key - row[..., None]).astype("float32")[:, None, None]
            scores = scores + slopes.reshape(kv_heads, group, 1, 1) * distance
        scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
        higher = jnp.maximum(m, scores.max(-1))
        base = jnp.where(jnp.isfinite(higher), higher, 0)[..., None]  # of rows that have seen nothing yet
        weights = jnp.where(seen[:, None, None], jnp.exp(scores - base), 0)
        shrink = jnp.exp(m - base[..., 0])
        v = jnp.where(seen.any(1)[..., None, None], v, 0)  # a slot that no query sees may hold NaN
        out = out * shrink[..., None] + jnp.einsum("bhgqk,bkhd->bhgqd", weights, v, precision="highest")
        return higher, total * shrink + weights.sum(-1), out

    shape = q.shape[:-1]
    logit = -jnp.inf if sinks is None else sinks.reshape(kv_heads, group, 1)  # a key that has no value
    m = jnp.broadcast_to(jnp.asarray(logit, "float32"), shape)
    total = jnp.full(shape, 0.0 if sinks is None else 1.0, "float32")
    m, total, out = lax.fori_loop(0, rounds, attend_chunk, (m, total, jnp.zeros((*shape, v_dim), "float32")))
    out = out / jnp.where(total > 0, total, 1)[..., None]
    return out, jnp.where(total > 0, m + jnp.log(jnp.where(total > 0, total, 1)), -jnp.inf)


def _keys(cache, page):
    """The rows of these pages, float32 [blocks, step * page_size, kv_heads, dim]."""
    rows = jnp.take(cache, page, axis=0, mode="clip")
    return rows.reshape(rows.shape[0], -1, *rows.shape[3:]).astype("float32")


def _seen(key, row, blocks, causal, left, right, tree):
    """[blocks width keys] bool: may the query that stands at `row` see `key`?"""
    seen = key < blocks.length[:, None, None]
    if tree is not None:
        old = blocks.length - blocks.new  # keys older than the new tokens
        bit = key - old[:, None, None]
        word = jnp.clip(bit // 32, 0, tree.shape[2] - 1)
        word = jnp.take_along_axis(tree, jnp.broadcast_to(word, (*tree.shape[:2], key.shape[2])), 2)
        allowed = word >> (bit % 32).astype("uint32") & 1
        return seen & ((bit < 0) | (allowed == 1))
    if causal:
        seen = seen & (key <= row)
    if left >= 0:
        seen = seen & (key >= row - left)
    if right >= 0:
        seen = seen & (key <= row + right)
    return seen
