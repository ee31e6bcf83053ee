"""New keys and values into their slots: csrc/cpu/write_kv.h."""

import torch

from . import _native
from ._call import DTYPES, channels, pointer, spread_channels

TRAITS = {"deterministic": True, "batch_invariant": True, "workspace_bytes": 0}


def refuse(k, v, k_cache, v_cache, slots, *, k_scale, v_scale):
    return [*spread_channels(k_cache=k_cache, v_cache=v_cache)]


def run(k, v, k_cache, v_cache, slots, *, k_scale, v_scale):
    slots, threads = channels(slots), torch.get_num_threads()
    for rows, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        if cache is None:
            continue
        rows, scale = channels(rows), scale if scale is None else scale.contiguous()
        tokens, heads, dim = rows.shape
        _native.write_kv(
            DTYPES[rows.dtype], DTYPES[cache.dtype], rows.data_ptr(), *rows.stride()[:2],
            cache.data_ptr(), *cache.stride()[:3], slots.data_ptr(), pointer(scale),
            scale is not None and scale.numel() > 1, tokens, heads, dim, cache.shape[0], cache.shape[1], threads,
        )  # fmt: skip
