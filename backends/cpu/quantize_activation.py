"""Rows rounded to 8 bits: csrc/cpu/quantize_activation.h."""

import torch

from . import _native
from ._call import DTYPES, matrix

TRAITS = {"deterministic": True, "batch_invariant": True, "accumulate": "float32", "workspace_bytes": 0}


def refuse(x, *, dtype, group, scale):
    return []


def run(x, *, dtype, group, scale):
    rows, hidden, kind = matrix(x), x.shape[-1], getattr(torch, dtype)
    groups = -(-hidden // group) if group else 1
    values = torch.empty(x.shape, dtype=kind)
    scales = torch.empty((*x.shape[:-1], groups), dtype=torch.float32)
    _native.quantize_activation(
        DTYPES[x.dtype], DTYPES[kind], rows.data_ptr(), rows.stride(0), values.data_ptr(), scales.data_ptr(),
        0.0 if scale is None else scale.item(), rows.shape[0], hidden, group or hidden, groups, torch.get_num_threads(),
    )  # fmt: skip
    return values, scales
