"""paged_attention through torch: the pages are gathered, then one of torch's attention kernels answers."""

import torch

from . import _attention_cpu as on_cpu

TRAITS = {"deterministic": True, "accumulate": "float32"}


def refuse(q, k_cache, v_cache, block_table, seq_lens, cu_seqlens_q, **options):
    if q.device.type not in ("cpu", "cuda"):
        yield "DEVICE", f"q is on {q.device.type}", "move the arrays to cpu or cuda"


def run(
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
    group = q.shape[1] // kv_heads
    scale = q.shape[2] ** -0.5 if scale is None else scale
    # The flash kernel's lse is off by 2e-5 in half precision, where it sums rounded weights.
    dtype = torch.float32 if return_lse or soft_cap else q.dtype
    queries = q
    if k_scale is not None and k_scale.numel() == 1:
        scale *= float(k_scale)
    elif k_scale is not None:
        queries, dtype = q.float() * k_scale.repeat_interleave(group)[:, None], torch.float32
    shared = _starts_with(k_cache, v_cache)
    slopes = None if alibi_slopes is None else alibi_slopes.view(kv_heads, group)
    options = on_cpu.Options(scale, causal, window, soft_cap, slopes, dtype)
    cache = on_cpu.Cache(k_cache, v_cache, block_table, shared)
    out, lse = on_cpu.attend(queries, cache, seq_lens, cu_seqlens_q, tree_mask, options)
    if sinks is not None:
        total = torch.logaddexp(lse, sinks)
        out *= torch.exp(lse - total)[..., None]
        lse = total
    if v_scale is not None:
        out *= v_scale.reshape(-1, 1).expand(kv_heads, group).reshape(-1, 1)
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _starts_with(k_cache, v_cache):
    """Whether v_cache is the first channels of k_cache, as in MLA."""
    return (
        v_cache.data_ptr() == k_cache.data_ptr()
        and v_cache.stride() == k_cache.stride()
        and v_cache.shape[3] <= k_cache.shape[3]
    )
