"""paged_attention through torch: the pages are gathered, then one of torch's attention kernels answers."""

import torch

from . import _attention_cpu as on_cpu
from . import _attention_cuda as on_cuda
from . import _common
from ._attention import Cache, Options
from ._common import refuse_device

TRAITS = {"deterministic": True, "graph_safe": True, "accumulate": "float32"}


def refuse(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, **options):
    yield from refuse_device(q)
    if not _common.on_host(q):
        cache, wishes = _bundled(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, **options)
        yield from on_cuda.refuse(q, cache, wishes)


def run(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, *, sinks=None, return_lse=False, **options):
    cache, options = _bundled(
        q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, return_lse=return_lse, **options
    )
    if q.numel() and k_cache.numel() and block_table.numel():
        out, lse = (on_cpu if _common.on_host(q) else on_cuda).attend(q, cache, options)
    else:  # nobody sees a key
        out = torch.zeros(*q.shape[:2], v_cache.shape[3], device=q.device)
        lse = torch.full(q.shape[:2], -torch.inf, device=q.device)
    if sinks is not None:
        total = torch.logaddexp(lse, sinks)
        out = out * torch.exp(lse - total)[..., None]
        lse = total
    out = out.to(q.dtype).contiguous()
    return (out, lse) if return_lse else out


def _bundled(
    q,
    k_cache,
    v_cache,
    block_table,
    seq_lens,
    cu_seqlens_q,
    *,
    scale=None,
    causal=True,
    window=(-1, -1),
    soft_cap=0.0,
    sinks=None,
    alibi_slopes=None,
    k_scale=None,
    v_scale=None,
    tree_mask=None,
    return_lse=False,
    max_seqlen_q=None,
    max_seqlen_k=None,
):
    kv_heads = k_cache.shape[2]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    slopes = None if alibi_slopes is None else alibi_slopes.view(kv_heads, -1)
    cache = Cache(k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, k_scale, v_scale)
    return cache, Options(scale, causal, window, soft_cap, slopes, tree_mask, return_lse, max_seqlen_q, max_seqlen_k)
