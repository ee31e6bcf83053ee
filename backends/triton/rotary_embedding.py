"""rotary_embedding: one program rotates HEADS heads of one token, of q or of k."""

import torch
import triton
import triton.language as tl

from ._launch import INTERPRETED, blocks, computed, launch, power, readable, refuse_device, rounded
from ._ptx import after_previous

TRAITS = {
    "deterministic": True,
    "batch_invariant": True,
    "graph_safe": True,
    "workspace_bytes": 0,
    "accumulate": "float32",
}


def refuse(q, **others):
    yield from refuse_device(q)


def run(q, k, cos, sin, positions, *, interleaved):
    q_out, k_out = (torch.empty(x.shape, dtype=computed(x.dtype), device=x.device) for x in (q, k))
    (tokens, heads, dim), half = q.shape, cos.shape[1]
    q_in, k_in = readable(q), readable(k)
    pairs, rest = power(half), power(dim - 2 * half)
    size = power(max(heads, k.shape[1]), most=max(1, (8192 if INTERPRETED else 1024) // max(pairs, rest)))
    q_blocks, k_blocks = blocks(heads, size), blocks(k.shape[1], size)
    launch(
        _rotate, (tokens, q_blocks + k_blocks), q, q_in, k_in, cos, sin, positions.contiguous(), q_out, k_out,
        heads, k.shape[1], q_blocks, *q_in.stride(), *k_in.stride(), *cos.stride(), *sin.stride(),
        DIM=dim, HALF=half, INTERLEAVED=interleaved, HEADS=size, PAIRS=pairs, REST=rest, num_warps=4,
    )  # fmt: skip
    return rounded(q_out, q.dtype), rounded(k_out, k.dtype)


@triton.jit
def _rotate(
    q, k, cos, sin, positions, q_out, k_out, heads, kv_heads, q_blocks,
    q_token, q_head, q_channel, k_token, k_head, k_channel, cos_row, cos_column, sin_row, sin_column,
    DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """q [tokens, heads, DIM], k [tokens, kv_heads, DIM] -> q_out, k_out, contiguous.  Strides in elements."""
    after_previous(CHAINED)
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, PAIRS)
    position = tl.load(positions + token)
    c = tl.load(cos + position * cos_row + pair * cos_column, mask=pair < HALF, other=0.0)
    s = tl.load(sin + position * sin_row + pair * sin_column, mask=pair < HALF, other=0.0)
    if block < q_blocks:
        _heads(q + token * q_token, q_out + token * heads * DIM, block, heads, q_head, q_channel, c, s,
               DIM, HALF, INTERLEAVED, HEADS, PAIRS, REST)  # fmt: skip
    else:
        _heads(k + token * k_token, k_out + token * kv_heads * DIM, block - q_blocks, kv_heads, k_head, k_channel,
               c, s, DIM, HALF, INTERLEAVED, HEADS, PAIRS, REST)  # fmt: skip


@triton.jit
def _heads(
    source, target, block, heads, head_stride, channel_stride, c, s,
    DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    head = block * HEADS + tl.arange(0, HEADS)
    rows, places = source + head[:, None] * head_stride, target + head[:, None] * DIM
    inside = (head < heads)[:, None]
    if INTERLEAVED:  # read and written side by side, split in registers
        channel = tl.arange(0, 2 * PAIRS)
        wanted = inside & (channel < 2 * HALF)
        x = tl.load(rows + channel * channel_stride, mask=wanted, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(x, [HEADS, PAIRS, 2]))
        turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), [HEADS, 2 * PAIRS])
        tl.store(places + channel, turned.to(target.dtype.element_ty), mask=wanted)
    else:
        pair = tl.arange(0, PAIRS)
        wanted = inside & (pair < HALF)
        a = tl.load(rows + pair * channel_stride, mask=wanted, other=0.0).to(tl.float32)
        b = tl.load(rows + (HALF + pair) * channel_stride, mask=wanted, other=0.0).to(tl.float32)
        tl.store(places + pair, (a * c - b * s).to(target.dtype.element_ty), mask=wanted)
        tl.store(places + HALF + pair, (b * c + a * s).to(target.dtype.element_ty), mask=wanted)
    if DIM > 2 * HALF:
        channel = 2 * HALF + tl.arange(0, REST)
        wanted = inside & (channel < DIM)
        tl.store(places + channel, tl.load(rows + channel * channel_stride, mask=wanted), mask=wanted)
