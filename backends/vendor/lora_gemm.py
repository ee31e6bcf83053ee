"""lora_gemm through torch's matrix products."""

import torch
from torch.nn.functional import linear

from . import _common
from ._common import refuse_device

TRAITS = {"deterministic": True, "graph_safe": True, "accumulate": "float32"}


def refuse(y, x, a, b, adapters, scales):
    yield from refuse_device(x)


def run(y, x, a, b, adapters, scales):
    if not y.numel() or not a.numel():
        return
    if not _common.on_host(y):
        _all_adapters(y, x, a, b, adapters, scales)
        return
    which = adapters.tolist()
    for i in sorted(set(which) - {-1}):
        rows = torch.tensor([row for row, adapter in enumerate(which) if adapter == i])
        update = linear(linear(x[rows].float(), a[i].float()), b[i].float()).mul_(scales[i])
        y[rows] = update.add_(y[rows]).to(y.dtype)


def _all_adapters(y, x, a, b, adapters, scales):
    """Every adapter for every row, in two products, and only a row's own part kept: no look at `adapters`."""
    count, rank, _ = a.shape
    own = adapters[:, None] == torch.arange(count, device=y.device)  # [rows, count]
    hidden = linear(x.float(), a.flatten(0, 1).float()).view(len(x), count, rank)
    hidden = torch.where(own[..., None], hidden, 0).flatten(1)
    used = torch.where(own.any(0)[:, None, None], b, 0)  # an adapter that no row names may hold NaN
    update = linear(hidden, used.transpose(0, 1).flatten(1).float())
    update *= scales.index_select(0, adapters.clamp(min=0))[:, None]
    y.copy_(torch.where((adapters >= 0)[:, None], update.add_(y).to(y.dtype), y))
