"""Rotary position embedding: csrc/cpu/rotary_embedding.h."""

import torch

from . import _native
from ._call import DTYPES, channels

TRAITS = {"deterministic": True, "batch_invariant": True, "accumulate": "float32", "workspace_bytes": 0}


def refuse(q, k, cos, sin, positions, *, interleaved):
    return []


def run(q, k, cos, sin, positions, *, interleaved):
    q, k, cos, sin, positions = channels(q), channels(k), channels(cos), channels(sin), channels(positions)
    tokens, heads, dim = q.shape
    q_out, k_out = torch.empty(q.shape, dtype=q.dtype), torch.empty(k.shape, dtype=k.dtype)
    _native.rotary_embedding(
        DTYPES[q.dtype], q.data_ptr(), *q.stride()[:2], k.data_ptr(), *k.stride()[:2], cos.data_ptr(), cos.stride(0),
        sin.data_ptr(), sin.stride(0), positions.data_ptr(), q_out.data_ptr(), k_out.data_ptr(), tokens, heads,
        k.shape[1], dim, cos.shape[1], cos.shape[0], interleaved, torch.get_num_threads(),
    )  # fmt: skip
    return q_out, k_out
