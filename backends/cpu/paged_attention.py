"""Paged attention: csrc/cpu/paged_attention.h."""

import torch

from . import _native
from ._call import DTYPES, channels, pointer, spread_channels

TRAITS = {"deterministic": True, "batch_invariant": True, "accumulate": "float32"}


def refuse(q, k_cache, v_cache, *rest, **options):
    return [*spread_channels(k_cache=k_cache, v_cache=v_cache)]


def run(
    q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, *, scale, causal, window, soft_cap, sinks, alibi_slopes,
    k_scale, v_scale, tree_mask, return_lse, max_seqlen_q, max_seqlen_k,
):  # fmt: skip
    tokens, heads, dim = q.shape
    pages, page_size, kv_heads, v_dim = v_cache.shape
    out = torch.empty((tokens, heads, v_dim), dtype=q.dtype)
    lse = torch.empty((tokens, heads), dtype=torch.float32) if return_lse else None
    q, block_table = channels(q), channels(block_table)
    per_head = any(s is not None and s.numel() > 1 for s in (k_scale, v_scale))
    if per_head:  # one value for all heads and one for each, as one kind
        k_scale, v_scale = (s if s is None else s.expand(kv_heads) for s in (k_scale, v_scale))
    # Named, so that copies outlive the call.
    lengths, starts, *floats = map(_dense, (seq_lens, cu_seqlens_q, sinks, alibi_slopes, k_scale, v_scale, tree_mask))
    _native.paged_attention(
        DTYPES[q.dtype], DTYPES[k_cache.dtype], q.data_ptr(), *q.stride()[:2],
        k_cache.data_ptr(), *k_cache.stride()[:3], v_cache.data_ptr(), *v_cache.stride()[:3],
        pages, page_size, kv_heads, heads // kv_heads, dim, v_dim, tokens, len(lengths),
        block_table.data_ptr(), block_table.stride(0), block_table.shape[1], lengths.data_ptr(), starts.data_ptr(),
        dim**-0.5 if scale is None else scale, causal, *window, soft_cap, *map(pointer, floats[:4]), per_head,
        pointer(floats[4]), 0 if tree_mask is None else tree_mask.shape[1],
        out.data_ptr(), pointer(lse), torch.get_num_threads(),
    )  # fmt: skip
    return (out, lse) if return_lse else out


def _dense(x):
    return x if x is None or x.is_contiguous() else x.contiguous()
