"""write_kv: one program stores BLOCK numbers of one token's key, and of its value."""

import torch
import triton
import triton.language as tl

from ._bytes import PLAIN, encoded, stored
from ._chip import INTERPRETER
from ._launch import INTERPRETED, blocks, launch, power, readable, refuse_device
from ._ptx import after_previous

TRAITS = {"deterministic": True, "batch_invariant": True, "graph_safe": True, "workspace_bytes": 0}

_INTEGERS = {2: torch.int16, 4: torch.int32}


def refuse(k, **others):
    yield from refuse_device(k)


def run(k, v, k_cache, v_cache, slots, *, k_scale, v_scale):
    k_in, k_out, kind = _pair(k, k_cache)
    v_in = v_out = None
    if v is not None:
        v_in, v_out, _ = _pair(v, v_cache)
    k_width, v_width = k.shape[1] * k.shape[2], 0 if v is None else v.shape[1] * v.shape[2]
    block = power(max(k_width, v_width), most=8192 if INTERPRETED else 1024)
    absent = (0, 0, 0)
    launch(
        _scatter, (k.shape[0], blocks(max(k_width, v_width), block)), k, k_in, v_in, k_out, v_out,
        slots.contiguous(), k_scale if k_scale is None else k_scale.contiguous(),
        v_scale if v_scale is None else v_scale.contiguous(), k_cache.shape[0] * k_cache.shape[1], k_width, v_width,
        *k_in.stride(), *(absent if v_in is None else v_in.stride()), *k_out.stride(),
        *((*absent, 0) if v_out is None else v_out.stride()), _step(k_scale), _step(v_scale),
        DIM=k.shape[2], V_DIM=1 if v is None else v.shape[2], PAGE=k_cache.shape[1], KIND=kind, BLOCK=block,
        num_warps=4,
    )  # fmt: skip


def _pair(rows, cache):
    """(rows, cache, kind) as the kernel is handed them: where nothing is computed, floats travel as integers."""
    if cache.dtype == rows.dtype:
        as_integers = _INTEGERS[rows.element_size()]
        return rows.view(as_integers), cache.view(as_integers), PLAIN.value
    return readable(rows), *stored(cache, INTERPRETER)  # FP8 as bits on every chip


def _step(scale):
    return 0 if scale is None or scale.numel() == 1 else 1


@triton.jit
def _scatter(
    k, v, k_cache, v_cache, slots, k_scale, v_scale, capacity, k_width, v_width,
    k_token, k_head, k_channel, v_token, v_head, v_channel,
    kc_page, kc_slot, kc_head, kc_channel, vc_page, vc_slot, vc_head, vc_channel, k_scale_head, v_scale_head,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PAGE: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """k [tokens, heads, DIM] -> k_cache [pages, PAGE, heads, DIM] at slots [tokens]; v alike.  Strides in elements."""
    after_previous(CHAINED)
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if (slot < 0) | (slot >= capacity):
        return
    page, offset = slot // PAGE, slot % PAGE
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    _store(k + token * k_token, k_cache + page * kc_page + offset * kc_slot, k_scale, at, k_width,
           k_head, k_channel, kc_head, kc_channel, k_scale_head, DIM, KIND)  # fmt: skip
    if v is not None:
        _store(v + token * v_token, v_cache + page * vc_page + offset * vc_slot, v_scale, at, v_width,
               v_head, v_channel, vc_head, vc_channel, v_scale_head, V_DIM, KIND)  # fmt: skip


@triton.jit
def _store(
    source, target, scale, at, width, from_head, from_channel, to_head, to_channel, scale_head,
    DIM: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    head, channel = at // DIM, at % DIM
    x = tl.load(source + head * from_head + channel * from_channel, mask=at < width, other=0)
    if KIND != PLAIN:
        x = x.to(tl.float32)
        if scale is not None:
            x = tl.div_rn(x, tl.load(scale + head * scale_head, mask=at < width, other=1.0))
        x = encoded(x, KIND)
    tl.store(target + head.to(tl.int64) * to_head + channel * to_channel, x, mask=at < width)
