"""rms_norm through torch.nn.functional.rms_norm, which computes in float32 and rounds once."""

import torch
from torch.nn.functional import rms_norm

from ._common import refuse_device

TRAITS = {"deterministic": True, "graph_safe": True, "accumulate": "float32"}


def refuse(x, weight, **options):
    yield from refuse_device(x)


def run(x, weight, *, residual=None, eps=1e-6):
    shape = weight.shape
    if residual is None:
        return rms_norm(x, shape, weight, eps)
    if x.dtype == torch.float32:
        s = x + residual
        return rms_norm(s, shape, weight, eps), s
    s = x.float().add_(residual)  # y is computed from the sum before it is rounded
    return rms_norm(s, shape, weight.float(), eps).to(x.dtype), s.to(x.dtype)
