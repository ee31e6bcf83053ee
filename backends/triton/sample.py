"""sample: one program draws the token of one row, by passes over its logits instead of a sort.

    pass 1       the largest logit and where it first stands: all that a greedy row needs
    passes 2..   top-k: the k-th largest key, by halving the range of keys
    passes ..    top-p: the smallest key above which lies less than top_p of the mass, likewise
    last two     the mass that is kept, and the block in which its running sum passes uniform; then inside that block

A key is a logit's bits as an integer of the same order: 32 halvings find a threshold exactly, 16 in bfloat16, and most
rows need fewer, because the ends of the range move to keys that exist.  Sums run in blocks of one order: the same row
gives the same token whatever else is in the batch.
"""

import torch
import triton
import triton.language as tl

from ._chip import chip_of
from ._launch import INTERPRETED, launch, power, readable, refuse_device
from ._ptx import after_previous

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
    block = power(vocab, 16, 32768 if INTERPRETED else 4096)
    launch(
        _draw, (rows,), logits, given, *wishes, tokens, vocab, *given.stride(),
        BLOCK=block, num_warps=max(1, min(8 if chip_of(logits).arch == "sm_80" else 16, block // 256)),
    )  # fmt: skip
    return tokens


SMALLEST = tl.constexpr(-(2**31) + 1)
LOG2E = tl.constexpr(1.4426950408889634)
STAGES = tl.constexpr(8)  # blocks of logits on their way: one program has to keep a whole processor's memory busy


@triton.jit
def _draw(
    logits, uniform, temperature, top_k, top_p, min_p, tokens, vocab, row_stride, column_stride,
    BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """logits [rows, vocab], the others [rows] or None -> tokens [rows]."""
    after_previous(CHAINED)
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * row_stride
    top, greedy = _largest(start, vocab, column_stride, BLOCK)
    rate = LOG2E  # of the exponential: exp((x - top) / temperature) = exp2((x - top) * rate)
    if temperature is not None:
        heat = tl.load(temperature + row)
        if heat == 0.0:
            tl.store(tokens + row, greedy.to(tl.int64))
            return
        rate = tl.minimum(LOG2E / heat, 3e38)
    lowest = SMALLEST  # the smallest key that is kept
    if top_k is not None:
        wanted = tl.load(top_k + row)
        if (wanted > 0) & (wanted < vocab):
            lowest = _threshold(start, vocab, column_stride, top, rate, SMALLEST, wanted.to(tl.float32), True, BLOCK)
    if top_p is not None:
        share = tl.load(top_p + row)
        if share < 1.0:
            mass, _, _ = _sums(start, vocab, column_stride, top, rate, lowest, 0.0, float("inf"), BLOCK)
            lowest = _threshold(start, vocab, column_stride, top, rate, lowest, share * mass, False, BLOCK)
    least = 0.0
    if min_p is not None:
        least = tl.load(min_p + row)
    total, _, _ = _sums(start, vocab, column_stride, top, rate, lowest, least, float("inf"), BLOCK)
    point = tl.load(uniform + row) * total
    _, at, before = _sums(start, vocab, column_stride, top, rate, lowest, least, point, BLOCK)
    index, x = _block(start, at, vocab, column_stride, BLOCK)
    weight = _kept(x, top, rate, lowest, least)
    upto = before + tl.cumsum(weight, 0)
    drawn = tl.min(tl.where((upto > point) & (weight > 0.0), index, vocab), 0)
    last = tl.max(tl.where(weight > 0.0, index, 0), 0)  # rounding may place the number beyond the block's sum
    tl.store(tokens + row, tl.minimum(drawn, last).to(tl.int64))


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
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    for at in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        index, x = _block(start, at, vocab, stride, BLOCK)
        where = tl.where(x > top, index, where)
        top = tl.maximum(top, x)
    largest = tl.max(top, 0)
    return largest, tl.min(tl.where(top == largest, where, vocab), 0)


@triton.jit
def _kept(x, top, rate, lowest, least):
    """The weights of logits whose key and weight are large enough, 0 for the others."""
    weight = tl.exp2((x - top) * rate)
    return tl.where((_key(x) >= lowest) & (weight >= least), weight, 0.0)


@triton.jit
def _sums(start, vocab, stride, top, rate, lowest, least, point, BLOCK: tl.constexpr):
    """(the sum of what is kept, the block in which it passes `point`, the sum before that block)."""
    total, block, before = 0.0, 0, 0.0
    for at in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        _, x = _block(start, at, vocab, stride, BLOCK)
        passed = total + tl.sum(_kept(x, top, rate, lowest, least), 0)
        here = (total <= point) & (passed > point)
        block, before = tl.where(here, at, block), tl.where(here, total, before)
        total = passed
    return total, block, before


@triton.jit
def _threshold(start, vocab, stride, top, rate, lowest, limit, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest key, at least `lowest`, above which lies less than `limit`: tokens or, without COUNT, weight."""
    low, high = lowest, _key(top)
    while low < high:
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # halfway, rounded down, without overflow
        above = tl.zeros([BLOCK], tl.float32)
        next_up = tl.zeros([BLOCK], tl.int32) + high  # the nearest keys that exist, above the middle and up to it
        next_down = tl.zeros([BLOCK], tl.int32) + low
        for at in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            _, x = _block(start, at, vocab, stride, BLOCK)
            key = _key(x)
            beyond = key > middle
            above += tl.where(beyond, 1.0 if COUNT else tl.exp2((x - top) * rate), 0.0)
            next_up = tl.minimum(next_up, tl.where(beyond, key, high))
            next_down = tl.maximum(next_down, tl.where(beyond, low, key))
        fits = tl.sum(above, 0) < limit
        high, low = tl.where(fits, tl.max(next_down, 0), high), tl.where(fits, low, tl.min(next_up, 0))
    return high
