"""quantized_gemm through torch's int4, int8 and FP8 kernels and oneDNN; _products.py tells which and why."""

import torch

from ._common import refuse_device
from ._products import quantized

TRAITS = {"deterministic": True, "graph_safe": True, "accumulate": "float32"}


def refuse(x, weight, **options):
    yield from refuse_device(x)


def run(x, weight, *, bias=None):
    out, columns = weight.shape
    if x.numel() and out:
        y = quantized(x.reshape(-1, columns), weight, x.dtype).view(*x.shape[:-1], out)
    else:
        y = torch.zeros(*x.shape[:-1], out, device=x.device)
    return (y if bias is None else y.add_(bias)).to(x.dtype)
