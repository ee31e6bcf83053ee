"""RMS normalisation: csrc/cpu/rms_norm.h."""

import torch

from . import _native
from ._call import DTYPES, matrix, pointer

TRAITS = {"deterministic": True, "batch_invariant": True, "accumulate": "float32", "workspace_bytes": 0}


def refuse(x, weight, *, residual, eps):
    return []


def run(x, weight, *, residual, eps):
    y = torch.empty(x.shape, dtype=x.dtype)
    kept = None if residual is None else torch.empty(x.shape, dtype=x.dtype)
    rows, added, gains = matrix(x), residual if residual is None else matrix(residual), weight.contiguous()
    _native.rms_norm(
        DTYPES[x.dtype], rows.data_ptr(), rows.stride(0), pointer(added), 0 if added is None else added.stride(0),
        gains.data_ptr(), y.data_ptr(), pointer(kept), rows.shape[0], rows.shape[1], eps, torch.get_num_threads(),
    )  # fmt: skip
    return y if residual is None else (y, kept)
