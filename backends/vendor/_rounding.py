"""Activations rounded to 8 bits, by row, by group of columns, or by one calibrated scale."""

import torch
from torch.nn.functional import pad

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "float8_e4m3fn": torch.float8_e4m3fn}
RANGE = {torch.int8: (-128, 127), torch.float8_e4m3fn: (-448, 448)}
SMALLEST = torch.finfo(torch.float32).tiny


def rounded(x, dtype, group=0, scale=None):
    """x / scales, rounded to `dtype`.

    Args:
        x: float32 [*rows, hidden]; it is not changed.
        group: columns that share a scale, 0 for the whole row.
        scale: one calibrated value, or None for the largest of each group / 127 (448).

    Returns:
        values [*rows, hidden] in `dtype`, scales float32 [*rows, groups].  A group of zeros, and one whose scale would
        be subnormal, has scale 1; one with a NaN or an infinity has values 0 and scale NaN.
    """
    hidden, (low, high) = x.shape[-1], RANGE[dtype]
    if group:
        group = min(group, hidden) or 1
        x = pad(x, (0, -hidden % group)).unflatten(-1, (-1 if hidden else 0, group))
    peak = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    finite = peak.isfinite()
    if scale is None:
        scale = peak / high
        scale = torch.where(scale < SMALLEST, 1, scale)
    ratio = (x / torch.where(finite, scale, torch.inf)).nan_to_num_(nan=0)  # 0 where something is not finite
    ratio = (ratio.round_() if dtype == torch.int8 else ratio).clamp_(low, high)
    scales = torch.where(finite, scale, torch.nan).squeeze(-1) if group else torch.where(finite, scale, torch.nan)
    return (ratio.flatten(-2)[..., :hidden] if group else ratio).to(dtype), scales
