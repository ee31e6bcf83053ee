"""The next token of each row: csrc/cpu/sample.h."""

import torch

from . import _native
from ._call import DTYPES, matrix, pointer

TRAITS = {"deterministic": True, "batch_invariant": True, "accumulate": "float64"}


def refuse(logits, uniform, *, temperature, top_k, top_p, min_p):
    return []


def run(logits, uniform, *, temperature, top_k, top_p, min_p):
    rows, tokens = matrix(logits), torch.empty(logits.shape[0], dtype=torch.int64)
    wishes = [x if x is None else x.contiguous() for x in (uniform, temperature, top_k, top_p, min_p)]
    _native.sample(
        DTYPES[rows.dtype], rows.data_ptr(), rows.stride(0), *map(pointer, wishes), tokens.data_ptr(), *rows.shape,
        torch.get_num_threads(),
    )  # fmt: skip
    return tokens
