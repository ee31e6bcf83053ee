"""The kernels of paged_attention: `attend` over one share of the keys, `combine` the shares.

A program of `attend` takes a tile of queries of one sequence, one KV head, and one share of the keys they see.

    rows of the tile      token 0 head 0 .. HEADS-1 | token 1 head 0 .. HEADS-1 | ...
    keys                  lo ......... left_edge ......... right_edge ......... hi
                          phase 0:     phase 1: all       phase 2:
                          some see     rows see           some see

The heads that share a KV head lie in one tile with their token, so that one new token already fills a matrix
instruction: decode, prefill and everything between run the same code.  Tiles are counted before anybody has read a
length: a sequence that begins at token b owns the tiles from b // TOKENS + its number on, which are enough.

Softmax is the online one of Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867, in powers of two; tiles and
shares as in FlashAttention-2 and Flash-Decoding, Dao 2023, https://arxiv.org/abs/2307.08691.
"""

import triton
import triton.language as tl

from ._bytes import decoded, halves
from ._ptx import after_previous

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
RAISE = tl.constexpr(15)  # float16 holds weights, 1 at most, 2^15 times as large: none is lost as too small


@triton.jit(do_not_specialize=["band"])
def attend(
    q, k_cache, v_cache, block_table, seq_lens, starts, k_scale, v_scale, slopes, sinks, tree,
    out, lse, share_out, share_lse,
    scale, unit, soft_cap, left, right, seqs, kv_heads, band,
    q_token, q_head, k_page, k_slot, k_head, k_channel, v_page, v_slot, v_head, v_channel, table_row, tree_row,
    k_scale_head, v_scale_head,
    GROUP: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_A: tl.constexpr, DIM_B: tl.constexpr,
    V_DIM: tl.constexpr, V_PAD: tl.constexpr, PAGE: tl.constexpr, KIND: tl.constexpr, WORDS: tl.constexpr,
    PTX: tl.constexpr, V_IN_K: tl.constexpr,
    SAME: tl.constexpr, WIDE: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, PLAIN_SCORES: tl.constexpr,
    SHARES: tl.constexpr, ONE_TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EDGE: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """q [tokens, heads, DIM], caches [pages, PAGE, kv_heads, DIM or V_DIM] -> out [tokens, heads, V_DIM] and lse.

    HEADS of the GROUP query heads of a KV head make a tile, with TOKENS = BLOCK_M // HEADS tokens.  DIM is read as
    DIM_A + DIM_B channels.  Strides are in elements.  What is None is not there.  Keys are read BLOCK_N at a time where
    every row sees them, else EDGE, which divides BLOCK_N.  A score
    times `unit` is an exponent of 2: unit is log2 e, and where nothing stands between score and softmax, scale too.
    The tiles of `band` heads begin one after the other, longest first, before those of the next heads.
    WIDE says that a cache reaches 2^31 elements or more, SAME that k_cache and v_cache have the same strides.

    WORDS: caches of one byte come as int16, each word two neighbouring channels, and their strides in words; q has 16
    bits.  Even and odd channels are two products each, in float16, which holds every stored byte and, with a power of
    two for each row, every number of q that is not 2^32 times smaller than the row's largest.
    """
    after_previous(CHAINED)
    TOKENS: tl.constexpr = BLOCK_M // HEADS
    PARTS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    TREE: tl.constexpr = tree is not None
    # Under a causal mask the last tiles have most to do.
    if ONE_TILE:
        tile, part = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    else:
        tile = (tl.num_programs(0) - 1 - tl.program_id(0)) // band
        part = tl.program_id(1) * band + tl.program_id(0) % band
    kv_head, split = part // PARTS, tl.program_id(2)
    seq = tile if ONE_TILE else _owner(tile, starts, seqs, TOKENS)
    begin_token = tl.load(starts + seq)
    new = tl.load(starts + seq + 1) - begin_token
    length = tl.load(seq_lens + seq)  # here, so that nobody waits for memory twice
    first = 0 if ONE_TILE else (tile - (begin_token // TOKENS + seq)) * TOKENS
    if first >= new:
        return

    row = tl.arange(0, BLOCK_M)
    index = first + row // HEADS  # of the row's token among the new ones
    in_group = part % PARTS * HEADS + row % HEADS
    real = (row < TOKENS * HEADS) & (index < new) & (in_group < GROUP)
    head = kv_head * GROUP + in_group
    token = begin_token + index
    position = length - new + index
    channel_a, channel_b, channel_v = tl.arange(0, DIM_A), DIM_A + tl.arange(0, DIM_B), tl.arange(0, V_PAD)
    EACH: tl.constexpr = 2 if WORDS else 1  # channels that are read at once
    word_a, word_b = tl.arange(0, DIM_A // EACH), DIM_A // EACH + tl.arange(0, DIM_B // EACH)
    word_v = tl.arange(0, V_PAD // EACH)
    q_row = q + token.to(tl.int64) * q_token + head * q_head
    q_a = tl.load(q_row[:, None] + channel_a, mask=real[:, None] & (channel_a < DIM), other=0.0)
    if DIM > DIM_A:
        q_b = tl.load(q_row[:, None] + channel_b, mask=real[:, None] & (channel_b < DIM), other=0.0)

    first_position, last_position = length - new + first, length - new + tl.minimum(first + TOKENS, new) - 1
    lo, hi, full_lo, full_hi = 0, length, 0, length  # what some row sees, and what every row sees
    if LEFT:
        lo, full_lo = tl.maximum(first_position - left, 0), tl.maximum(last_position - left, 0)
    if RIGHT:
        hi, full_hi = tl.minimum(length, last_position + right + 1), tl.minimum(length, first_position + right + 1)
    if TREE:
        full_hi = length - new
    start = lo // BLOCK_N * BLOCK_N  # so that a block of keys lies in one page where pages are large
    share = tl.cdiv(tl.cdiv(tl.maximum(hi - start, 0), BLOCK_N), tl.num_programs(2)) * BLOCK_N
    begin = start + split * share
    end = tl.minimum(begin + share, hi)
    left_edge = tl.maximum(begin, tl.minimum(end, tl.cdiv(full_lo, BLOCK_N) * BLOCK_N))
    right_edge = tl.maximum(left_edge, tl.minimum(end, full_hi // BLOCK_N * BLOCK_N))

    factor = scale
    if k_scale is not None:
        factor = scale * tl.load(k_scale + kv_head * k_scale_head)
    power = unit
    if WORDS:
        largest = tl.max(tl.abs(q_a.to(tl.float32)), 1)
        if DIM > DIM_A:
            largest = tl.maximum(largest, tl.max(tl.abs(q_b.to(tl.float32)), 1))
        smaller, larger = _towards(largest, 15)
        q_a, q_a_odd = _split((q_a.to(tl.float32) * smaller[:, None]).to(tl.float16))
        if DIM > DIM_A:
            q_b, q_b_odd = _split((q_b.to(tl.float32) * smaller[:, None]).to(tl.float16))
        if PLAIN_SCORES:
            power = larger * unit
        else:
            power = tl.full([BLOCK_M], unit, tl.float32)
            factor = (larger * factor)[:, None]
    if slopes is not None:
        slope = tl.load(slopes + head, mask=real, other=0.0)
    table = block_table + seq.to(tl.int64) * table_row
    k_start, v_start = k_cache + kv_head.to(tl.int64) * k_head, v_cache + kv_head.to(tl.int64) * v_head
    acc = tl.zeros([BLOCK_M, V_PAD // EACH], tl.float32)
    acc_odd = acc
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)  # the largest score so far
    total = tl.zeros([BLOCK_M], tl.float32)
    for PHASE in tl.static_range(0 if LEFT else 1, 3):
        from_key = begin if PHASE == 0 else left_edge if PHASE == 1 else right_edge
        to_key = left_edge if PHASE == 0 else right_edge if PHASE == 1 else end
        of_block = tl.arange(0, BLOCK_N if PHASE == 1 else EDGE)  # masks take registers, so fewer keys at the edges
        for n in tl.range(from_key, to_key, BLOCK_N if PHASE == 1 else EDGE):
            key = n + of_block
            live = (key >= lo) & (key < hi)
            if PAGE % (BLOCK_N if PHASE == 1 else EDGE) == 0:
                page = tl.load(table + n // PAGE)
                slot = n % PAGE + of_block
            else:
                page = tl.load(table + key // PAGE, mask=live, other=0) if PHASE != 1 else tl.load(table + key // PAGE)
                slot = key % PAGE
            if WIDE:
                page = page.to(tl.int64)
            row_offset = page * k_page + slot * k_slot
            k_row = k_start + row_offset
            k_a = _rows(k_row, live, word_a, k_channel, PHASE != 1, DIM // EACH, DIM < DIM_A)
            if WORDS:
                k_a, k_a_odd = halves(k_a, KIND, PTX)
                scores = tl.dot(q_a, tl.trans(k_a))
                scores = tl.dot(q_a_odd, tl.trans(k_a_odd), scores)
            else:
                k_a = decoded(k_a, q.dtype.element_ty, KIND)
                scores = tl.dot(q_a, tl.trans(k_a), input_precision="ieee")
            if DIM > DIM_A:
                k_b = _rows(k_row, live, word_b, k_channel, PHASE != 1, DIM // EACH, DIM < DIM_A + DIM_B)
                if WORDS:
                    k_b, k_b_odd = halves(k_b, KIND, PTX)
                    scores = tl.dot(q_b, tl.trans(k_b), scores)
                    scores = tl.dot(q_b_odd, tl.trans(k_b_odd), scores)
                else:
                    k_b = decoded(k_b, q.dtype.element_ty, KIND)
                    scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision="ieee")
            if not PLAIN_SCORES:
                scores = scores * factor
                if soft_cap is not None:
                    scores = soft_cap * (2.0 / (1.0 + tl.exp2(scores * (-2.0 * LOG2E / soft_cap))) - 1.0)
                if slopes is not None:
                    scores += slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
            if PHASE != 1:
                seen = live[None, :]
                if LEFT:
                    seen = seen & (key[None, :] >= position[:, None] - left)
                if RIGHT:
                    seen = seen & (key[None, :] <= position[:, None] + right)
                if TREE:
                    guess = key - (length - new)  # which new token the key is
                    word = tl.load(
                        tree + token.to(tl.int64)[:, None] * tree_row + (guess >> 5)[None, :],
                        mask=real[:, None] & ((guess >= 0) & (guess < new))[None, :],
                        other=0,
                    )
                    seen = seen & ((guess < 0)[None, :] | (((word >> (guess & 31)[None, :]) & 1) == 1))
                scores = tl.where(seen, scores, -float("inf"))
            above = tl.maximum(top, tl.max(scores, 1))
            base = tl.where(above == -float("inf"), 0.0, above) if PHASE != 1 else above
            if WORDS:
                weights = tl.exp2(scores * power[:, None] - (base * power - RAISE)[:, None])
            elif q.dtype.element_ty == tl.float32:
                weights = tl.exp2((scores - base[:, None]) * unit)
            else:  # one instruction less
                weights = tl.exp2(scores * unit - (base * unit)[:, None])
            shrink = tl.exp2((top - base) * power)
            total = total * shrink + tl.sum(weights, 1)
            acc = acc * shrink[:, None]
            if not V_IN_K:
                v_row = v_start + (row_offset if SAME else page * v_page + slot * v_slot)
                values = _rows(v_row, live, word_v, v_channel, PHASE != 1, V_DIM // EACH, V_DIM < V_PAD)
            if WORDS:
                v_even, v_odd = (k_a, k_a_odd) if V_IN_K else halves(values, KIND, PTX)
                acc = tl.dot(weights.to(tl.float16), v_even, acc)
                acc_odd = tl.dot(weights.to(tl.float16), v_odd, acc_odd * shrink[:, None])
            else:
                values = k_a if V_IN_K else decoded(values, q.dtype.element_ty, KIND)
                acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")
            top = above

    top = top * power
    if WORDS:
        acc = tl.reshape(tl.join(acc, acc_odd), (BLOCK_M, V_PAD)) * 2.0**-RAISE
        total = total * 2.0**-RAISE
    if v_scale is not None:
        acc = acc * tl.load(v_scale + kv_head * v_scale_head)
    at = token.to(tl.int64) * (kv_heads * GROUP) + head
    columns = real[:, None] & (channel_v < V_DIM)
    if SHARES:
        at = at * tl.num_programs(2) + split
        acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(share_out + at[:, None] * V_DIM + channel_v, acc, mask=columns)
        tl.store(share_lse + at, top + tl.log2(total), mask=real)
    else:
        if sinks is not None:
            sink = tl.load(sinks + head, mask=real, other=0.0) * LOG2E
            above = tl.maximum(top, sink)
            total = total * tl.exp2(top - above) + tl.exp2(sink - above)
            acc = acc * tl.exp2(top - above)[:, None]
            top = above
        acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
        tl.store(out + at[:, None] * V_DIM + channel_v, acc.to(out.dtype.element_ty), mask=columns)
        if lse is not None:
            tl.store(lse + at, (top + tl.log2(total)) * LN2, mask=real)


@triton.jit
def _owner(tile, starts, seqs, TOKENS: tl.constexpr):
    """The sequence to which a tile belongs: the last s with starts[s] // TOKENS + s <= tile."""
    count = 0
    for at in tl.range(0, seqs, 128):  # all at once: halving would wait for memory again and again
        seq = at + tl.arange(0, 128)
        begins = tl.load(starts + seq, mask=seq < seqs, other=0) // TOKENS + seq
        count += tl.sum(((begins <= tile) & (seq < seqs)).to(tl.int32), 0)
    return count - 1


@triton.jit
def _towards(largest, EXPONENT: tl.constexpr):
    """Powers of two for float32 numbers >= 0: what brings each below 2^EXPONENT, not below half of it, and back."""
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    found = tl.minimum(253 + EXPONENT - exponent, 253)  # both are normal numbers
    return (found << 23).to(tl.float32, bitcast=True), ((254 - found) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _split(x):
    """The even and the odd columns."""
    return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))


@triton.jit
def _rows(start, live, channel, stride, EDGE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Channels of the rows that begin at `start` [BLOCK_N]; zeros for dead rows, which may hold anything."""
    at = start[:, None] + channel * stride
    if EDGE and PADDED:
        return tl.load(at, mask=live[:, None] & (channel < WIDTH), other=0.0)
    elif EDGE:
        return tl.load(at, mask=live[:, None], other=0.0)
    elif PADDED:
        return tl.load(at, mask=(channel < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def combine(
    share_out, share_lse, sinks, out, lse, heads,
    SHARES: tl.constexpr, PADDED: tl.constexpr, V_DIM: tl.constexpr, BLOCK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """share_out [tokens, heads, SHARES, V_DIM] and share_lse [tokens, heads, SHARES], base 2 -> out, lse."""
    after_previous(CHAINED)
    head = tl.program_id(1)
    at = tl.program_id(0).to(tl.int64) * heads + head
    share = tl.arange(0, PADDED)
    channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    parts = tl.load(share_lse + at * SHARES + share, mask=share < SHARES, other=-float("inf"))
    top = tl.max(parts, 0)
    if sinks is not None:
        sink = tl.load(sinks + head) * LOG2E
        top = tl.maximum(top, sink)
    base = tl.where(top == -float("inf"), 0.0, top)
    weights = tl.exp2(parts - base)
    total = tl.sum(weights, 0)
    if sinks is not None:
        total += tl.exp2(sink - base)
    values = tl.load(
        share_out + (at * SHARES + share)[:, None] * V_DIM + channel,
        mask=((share < SHARES) & (weights > 0.0))[:, None] & (channel < V_DIM),
        other=0.0,
    )
    result = tl.sum(values * weights[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + at * V_DIM + channel, result.to(out.dtype.element_ty), mask=channel < V_DIM)
    if lse is not None:
        tl.store(lse + at, (top + tl.log2(total)) * LN2, mask=tl.program_id(2) == 0)
