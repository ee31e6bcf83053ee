"""rms_norm: _rows.py, with nothing rounded to 8 bits."""

import torch

from ._launch import computed, refuse_device, rounded, rows_of
from ._rows import prepared

TRAITS = {
    "deterministic": True,
    "batch_invariant": True,
    "graph_safe": True,
    "workspace_bytes": 0,
    "accumulate": "float32",
}


def refuse(x, weight, **options):
    yield from refuse_device(x)


def run(x, weight, *, residual, eps):
    dtype = computed(x.dtype)
    kept = None if residual is None else torch.empty(x.shape, dtype=dtype, device=x.device)
    y, _ = prepared(
        rows_of(x), norm="rms", gain=weight.contiguous(), residual=None if residual is None else rows_of(residual),
        eps=eps, keep=kept, dtype=dtype,
    )  # fmt: skip
    y = rounded(y, x.dtype).view(x.shape)
    return y if residual is None else (y, rounded(kept, x.dtype))
