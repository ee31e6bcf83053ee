"""A low-rank update of each row by its own adapter, in place: csrc/cpu/lora_gemm.h."""

import torch

from . import _native
from ._call import DTYPES, matrix

TRAITS = {"deterministic": True, "batch_invariant": True, "accumulate": "float32"}


def refuse(y, x, a, b, adapters, scales):
    if y.stride(1) != 1 and y.shape[1] > 1 and y.shape[0] > 0:
        yield "LAYOUT", f"y has stride {y.stride(1)} along a row", "give y unit stride along its rows"


def run(y, x, a, b, adapters, scales):
    rows, a = matrix(x), a.contiguous()
    b = b if 1 in b.stride()[1:] else b.contiguous()
    adapters, scales = adapters.contiguous(), scales.contiguous()
    _native.lora_gemm(
        DTYPES[x.dtype], y.data_ptr(), y.stride(0), rows.data_ptr(), rows.stride(0), a.data_ptr(),
        b.data_ptr(), *b.stride(), adapters.data_ptr(), scales.data_ptr(), *rows.shape, y.shape[1], a.shape[1],
        a.shape[0], torch.get_num_threads(),
    )  # fmt: skip
