"""write_kv through torch's scatter."""

import torch

from . import _common
from ._common import refuse_device

TRAITS = {"deterministic": True, "batch_invariant": True, "graph_safe": True, "accumulate": "float32"}


def refuse(k, v, k_cache, v_cache, slots, **options):
    yield from refuse_device(k)


def run(k, v, k_cache, v_cache, slots, *, k_scale=None, v_scale=None):
    page_size, capacity = k_cache.shape[1], k_cache.shape[0] * k_cache.shape[1]
    if not slots.numel() or not capacity:
        return
    tokens, stored = None, None
    if not _common.on_host(slots):
        tokens, slots, stored = _without_skipped(slots, capacity)
    elif int(slots.min()) < 0 or int(slots.max()) >= capacity:
        tokens = ((slots >= 0) & (slots < capacity)).nonzero().flatten()
        slots = slots[tokens]
    page = torch.div(slots, page_size, rounding_mode="floor")
    index = page, slots - page * page_size
    for rows, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if cache is None:
            continue
        values = _stored(rows if tokens is None else rows.index_select(0, tokens), scale, cache.dtype)
        if cache.dtype.itemsize == 1:
            values, cache = values.view(torch.int8), cache.view(torch.int8)  # torch scatters bytes, not FP8
        if stored is not None:
            values = torch.where(stored.view(1, 1, 1), values, cache[index])
        cache.index_put_(index, values)


def _without_skipped(slots, capacity):
    """The same write without a look at the values: skipped tokens repeat one that is stored, with the same bytes.

    Returns:
        which token each row of the write takes, its slot, and whether anything is stored at all: if nothing is, slot 0
        gets what it holds.
    """
    valid = (slots >= 0) & (slots < capacity)
    some = valid.to(torch.uint8).argmax().view(1)
    tokens = torch.where(valid, torch.arange(len(slots), device=slots.device), some)
    stored = valid.index_select(0, some)
    return tokens, torch.where(stored, slots.index_select(0, tokens), 0), stored


def _stored(rows, scale, dtype):
    """rows / scale in `dtype`, rounded to nearest even, saturated."""
    if dtype.is_floating_point and dtype.itemsize > 1:
        return rows
    rows = rows.float() if scale is None else rows.float() / scale.reshape(-1, 1)
    if dtype == torch.int8:
        return torch.nan_to_num(rows, nan=0).round_().clamp_(-128, 127).to(dtype)
    return rows.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max).to(dtype)
