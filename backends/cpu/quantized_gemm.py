"""x @ wT for quantized weights: csrc/cpu/gemm.h."""

import torch

from . import _native
from ._call import DTYPES, matrix, pointer
from ._packing import packed

TRAITS = {"deterministic": True, "batch_invariant": True, "accumulate": "float32"}
NO_NORM = (_native.NORM["none"], 0, 0, 0.0)
NO_ACTIVATION = _native.ACTIVATION["none"]


def refuse(x, weight, *, bias):
    return []


def run(x, weight, *, bias):
    y = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype)
    rows, form, added = matrix(x), packed(weight, False), None if bias is None else bias.contiguous()
    _native.gemm(
        *form.arguments, *NO_NORM, DTYPES[x.dtype], rows.data_ptr(), rows.stride(0), 0, 0, 0, rows.shape[0],
        pointer(added), NO_ACTIVATION, y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return y
