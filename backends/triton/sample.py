"""sample: one program draws the token of one row, by passes over its logits instead of a sort.

    pass 1       the largest logit and where it first stands: all that a greedy row needs
    passes 2..   top-k: the k-th largest key, by halving the range of keys
    passes ..    top-p: the smallest key above which lies less than top_p of the mass, likewise
    last two     the mass that is kept; its running sum up to the block in which it passes uniform, then in it

A key is a logit's bits as an integer of the same order: 32 halvings find a threshold exactly, 16 in bfloat16, and most
rows need fewer, because the ends of the range move to keys that exist.  Sums run in blocks of one order: the same row
gives the same token whatever else is in the batch.
"""

import torch
import triton
import triton.language as tl

from ._launch import INTERPRETED, launch, power, readable, refuse_device

TRAITS = {
    "deterministic": True,
    "batch_invariant": True,
    "graph_safe": True,
    "workspace_bytes": 0,
    "accumulate": "float32",
}


def refuse(logits, **others):
    yield from refuse_device(logits)


def run(logits, uniform, *, temperature, top_k, top_p, min_p):
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    wishes = [x if x is None else x.contiguous() for x in (uniform, temperature, top_k, top_p, min_p)]
    given = readable(logits)
    block = power(vocab, 16, 32768 if INTERPRETED else 16384)
    launch(
        _draw, (rows,), logits, given, *wishes, tokens, vocab, *given.stride(),
        BLOCK=block, num_warps=max(1, min(16, block // 512)),
    )  # fmt: skip
    return tokens


SMALLEST = tl.constexpr(-(2**31) + 1)


@triton.jit
def _draw(
    logits, uniform, temperature, top_k, top_p, min_p, tokens, vocab, row_stride, column_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """logits [rows, vocab], the others [rows] or None -> tokens [rows]."""
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * row_stride
    top, greedy = _largest(start, vocab, column_stride, BLOCK)
    heat = 1.0
    if temperature is not None:
        heat = tl.load(temperature + row)
        if heat == 0.0:
            tl.store(tokens + row, greedy.to(tl.int64))
            return
    lowest = SMALLEST  # the smallest key that is kept
    if top_k is not None:
        wanted = tl.load(top_k + row)
        if (wanted > 0) & (wanted < vocab):
            lowest = _threshold(start, vocab, column_stride, top, heat, SMALLEST, wanted.to(tl.float32), True, BLOCK)
    if top_p is not None:
        share = tl.load(top_p + row)
        if share < 1.0:
            limit = share * _mass(start, vocab, column_stride, top, heat, lowest, 0.0, BLOCK)
            lowest = _threshold(start, vocab, column_stride, top, heat, lowest, limit, False, BLOCK)
    least = 0.0
    if min_p is not None:
        least = tl.load(min_p + row)
    total = _mass(start, vocab, column_stride, top, heat, lowest, least, BLOCK)
    point = tl.load(uniform + row) * total
    before = 0.0
    at = 0
    found = -1
    while (at < vocab) & (found < 0):
        index, x = _block(start, at, vocab, column_stride, BLOCK)
        mass = _kept(x, top, heat, lowest, least)
        here = tl.sum(mass, 0)
        if (before + here > point) | (at + BLOCK >= vocab):
            upto = before + tl.cumsum(mass, 0)
            drawn = tl.min(tl.where((upto > point) & (mass > 0.0), index, vocab), 0)
            last = tl.max(tl.where(mass > 0.0, index, -1), 0)  # rounding may place the number beyond the sum
            found = tl.where(drawn < vocab, drawn, last)
        before += here
        at += BLOCK
    tl.store(tokens + row, tl.where(found < 0, greedy, found).to(tl.int64))


@triton.jit
def _key(x):
    """float32 -> int32 of the same order."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _block(start, at, vocab, stride, BLOCK: tl.constexpr):
    """The indices of a block, and its logits in float32; -inf behind the last."""
    index = at + tl.arange(0, BLOCK)
    return index, tl.load(start + index * stride, mask=index < vocab, other=-float("inf")).to(tl.float32)


@triton.jit
def _largest(start, vocab, stride, BLOCK: tl.constexpr):
    """The largest logit, and its first index."""
    top, where = -float("inf"), 0
    for at in tl.range(0, vocab, BLOCK):
        index, x = _block(start, at, vocab, stride, BLOCK)
        here = tl.max(x, 0)
        first = tl.min(tl.where(x == here, index, vocab), 0)
        where = tl.where(here > top, first, where)
        top = tl.maximum(top, here)
    return top, where


@triton.jit
def _weight(x, top, heat):
    """exp((x - top) / heat)."""
    return tl.exp(tl.div_rn(x - top, heat))


@triton.jit
def _kept(x, top, heat, lowest, least):
    """The weights of logits whose key and weight are large enough, 0 for the others."""
    weight = _weight(x, top, heat)
    return tl.where((_key(x) >= lowest) & (weight >= least), weight, 0.0)


@triton.jit
def _mass(start, vocab, stride, top, heat, lowest, least, BLOCK: tl.constexpr):
    total = 0.0
    for at in tl.range(0, vocab, BLOCK):
        _, x = _block(start, at, vocab, stride, BLOCK)
        total += tl.sum(_kept(x, top, heat, lowest, least), 0)
    return total


@triton.jit
def _threshold(start, vocab, stride, top, heat, lowest, limit, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest key, at least `lowest`, above which lies less than `limit`: tokens or, without COUNT, weight."""
    low, high = lowest, _key(top)
    while low < high:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # halfway, rounded down, without overflow
        above, next_up, next_down = 0.0, high, low
        for at in tl.range(0, vocab, BLOCK):
            _, x = _block(start, at, vocab, stride, BLOCK)
            key = _key(x)
            beyond = key > middle
            above += tl.sum(tl.where(beyond, 1.0 if COUNT else _weight(x, top, heat), 0.0), 0)
            next_up = tl.minimum(next_up, tl.min(tl.where(beyond, key, high), 0))
            next_down = tl.maximum(next_down, tl.max(tl.where(beyond, low, key), 0))
        fits = above < limit
        high = tl.where(fits, next_down, high)
        low = tl.where(fits, low, next_up)
    return high
