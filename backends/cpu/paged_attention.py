"""Paged attention: csrc/cpu/paged_attention.h."""

import torch

from . import _native
from ._call import DTYPES, channels, pointer, spread_channels

TRAITS = {"deterministic": True, "batch_invariant": True, "accumulate": "float32"}
NONE = (0, 0, 0, 0, 0)  # the addresses of arguments that most calls leave out


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
    # Named here, so that copies live as long as the call.
    q, block_table, lengths, starts = channels(q), channels(block_table), channels(seq_lens), channels(cu_seqlens_q)
    addresses, per_head = NONE, False
    if not (sinks is alibi_slopes is k_scale is v_scale is tree_mask is None):
        if per_head := any(scale is not None and scale.numel() > 1 for scale in (k_scale, v_scale)):
            k_scale, v_scale = (scale if scale is None else scale.expand(kv_heads) for scale in (k_scale, v_scale))
        rare = [x if x is None else x.contiguous() for x in (sinks, alibi_slopes, k_scale, v_scale, tree_mask)]
        addresses = tuple(map(pointer, rare))
    q_token, q_head, _ = q.stride()
    k_page, k_slot, k_head, _ = k_cache.stride()
    v_page, v_slot, v_head, _ = v_cache.stride()
    _native.paged_attention(
        DTYPES[q.dtype], DTYPES[k_cache.dtype], q.data_ptr(), q_token, q_head,
        k_cache.data_ptr(), k_page, k_slot, k_head, v_cache.data_ptr(), v_page, v_slot, v_head,
        pages, page_size, kv_heads, heads // kv_heads, dim, v_dim, tokens, lengths.shape[0],
        block_table.data_ptr(), block_table.stride(0), block_table.shape[1], lengths.data_ptr(), starts.data_ptr(),
        dim**-0.5 if scale is None else scale, causal, window[0], window[1], soft_cap,
        *addresses[:4], per_head, addresses[4], 0 if tree_mask is None else tree_mask.shape[1],
        out.data_ptr(), pointer(lse), torch.get_num_threads(),
    )  # fmt: skip
    return (out, lse) if return_lse else out
