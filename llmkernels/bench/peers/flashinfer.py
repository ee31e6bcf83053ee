"""FlashInfer's paged attention and norms on NVIDIA GPUs, where it is installed.  Its plan is made outside the clock."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from llmkernels.bench.peers import Call, peer
from llmkernels.bench.peers.attention import OPTIONAL

WORKSPACE = 256 << 20  # bytes; what its documentation advises


@cache
def _workspace(device: torch.device) -> torch.Tensor:
    return torch.empty(WORKSPACE, dtype=torch.uint8, device=device)


@peer("paged_attention", "FlashInfer", needs="flashinfer")
def paged_attention(call: Call) -> Callable[[], Any] | None:
    import flashinfer

    q, k_cache, v_cache = call["q"], call["k_cache"], call["v_cache"]
    plain = not call["return_lse"] and all(call[name] is None for name in OPTIONAL)
    if not plain or not q.is_cuda or k_cache.dtype != q.dtype:
        return None
    if q.dtype == torch.float32 or call["window"][1] >= 0 or not (k_cache.is_contiguous() and v_cache.is_contiguous()):
        return None
    page_size, lengths = k_cache.shape[1], call["seq_lens"].tolist()
    counts = [-(-length // page_size) for length in lengths]
    indptr = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(q.device)
    indices = torch.cat([row[:count] for row, count in zip(call["block_table"], counts, strict=True)])
    last = torch.tensor([(n - 1) % page_size + 1 for n in lengths], dtype=torch.int32, device=q.device)
    heads, kv_heads, dim = q.shape[1], k_cache.shape[2], q.shape[2]
    options = {
        "sm_scale": call["scale"],
        "window_left": call["window"][0],
        "logits_soft_cap": call["soft_cap"] or None,
        "q_data_type": q.dtype,
        "kv_data_type": k_cache.dtype,
    }
    wrapper: Any
    if q.shape[0] == len(lengths) and call["causal"]:
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(q.device), "NHD", use_tensor_cores=True)
        wrapper.plan(indptr, indices, last, heads, kv_heads, dim, page_size, **options)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(q.device), "NHD")
        starts, causal = call["cu_seqlens_q"], call["causal"]
        wrapper.plan(starts, indptr, indices, last, heads, kv_heads, dim, page_size, causal=causal, **options)
    return lambda: wrapper.run(q, (k_cache, v_cache))


@peer("rms_norm", "FlashInfer", needs="flashinfer")
def rms_norm(call: Call) -> Callable[[], Any] | None:
    import flashinfer

    x, weight = call["x"], call["weight"]
    if not x.is_cuda or call["residual"] is not None or x.dtype == torch.float32:
        return None
    return lambda: flashinfer.rmsnorm(x, weight, call["eps"])


@peer("silu_and_mul", "FlashInfer", needs="flashinfer")
def silu_and_mul(call: Call) -> Callable[[], Any] | None:
    import flashinfer

    x = call["x"]
    if not x.is_cuda or x.dtype == torch.float32:
        return None
    return lambda: flashinfer.silu_and_mul(x)
