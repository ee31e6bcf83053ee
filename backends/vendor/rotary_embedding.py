"""rotary_embedding through torch's pointwise kernels, queries and keys in one go, in float32."""

import torch

from ._common import refuse_device

TRAITS = {"deterministic": True, "batch_invariant": True, "graph_safe": True, "accumulate": "float32"}


def refuse(q, k, cos, sin, positions, **options):
    yield from refuse_device(q)


def run(q, k, cos, sin, positions, *, interleaved=False):
    x = torch.cat([q, k], 1)
    half = cos.shape[1]
    c, s = (table.index_select(0, positions)[:, None] for table in (cos, sin))
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    (a, b), (low, high) = _pairs(x, half, interleaved), _pairs(out, half, interleaved)
    torch.mul(a, c, out=low).addcmul_(b, s, value=-1)
    torch.mul(b, c, out=high).addcmul_(a, s)
    if 2 * half < x.shape[-1]:
        out[..., 2 * half :] = x[..., 2 * half :]
    return out.to(q.dtype).split([q.shape[1], k.shape[1]], 1)


def _pairs(x, half, interleaved):
    """The first and the second channels of all pairs, as views."""
    rotated = x if x.shape[-1] == 2 * half else x.narrow(-1, 0, 2 * half)
    return rotated.unflatten(-1, (half, 2)).unbind(-1) if interleaved else rotated.split([half, half], -1)
