"""How activations are rounded, for quantize_activation and for every product whose scheme rounds them.

    scale = max over the group of |x| / largest        largest is 127 (int8) or 448 (float8_e4m3fn)
    value = round(x / scale), ties to even, saturated to -128..127 or -448..448

A group is a whole row, or `group` consecutive columns of it (the last may be short).  Two groups have another scale:
    all zeros, or so small that the scale would be below float32's smallest normal number: 1, and so all values are 0;
    a NaN or an infinity in it: NaN, and all values are 0, so that what is computed from them is NaN and not finite.
With a calibrated scale, that one takes the place of the first formula; a NaN or an infinity is treated the same.
"""

import torch

from llmkernels.quant.scheme import Scheme

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}
LOWEST = {"int8": -128.0, "float8_e4m3fn": -448.0}
SMALLEST = torch.finfo(torch.float32).tiny  # below it, hardware may flush a scale to zero
STORED = {"int8": "int8", "fp8": "float8_e4m3fn"}  # what a scheme calls its activations -> their dtype


def scaled(
    x: torch.Tensor, dtype: str, group: int = 0, scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x / scale, saturated but not rounded [*rows hidden], scales [*rows groups]), float32 or float64 as x is.

    Raises:
        KeyError: no such dtype; contracts check it first.
    """
    hidden = x.shape[-1]
    width = min(group or hidden, hidden) or 1
    groups = -(-hidden // width) if group else 1
    grouped = torch.nn.functional.pad(x, (0, groups * width - hidden)).unflatten(-1, (groups, width))
    peak = grouped.abs().amax(-1)  # NaN where there is one
    if scale is None:
        scales = peak / LARGEST[dtype]
        scales = torch.where(scales < SMALLEST, 1, scales)
    else:
        scales = scale.to(x.dtype).reshape(()).expand(peak.shape)
    finite = peak.isfinite()
    scales = torch.where(finite, scales, torch.nan)
    ratio = torch.where(finite[..., None], grouped / scales[..., None], 0).clamp(LOWEST[dtype], LARGEST[dtype])
    return ratio.flatten(-2)[..., :hidden], scales


def rounded(ratio: torch.Tensor, dtype: str) -> torch.Tensor:
    """`ratio` rounded to what `dtype` can hold, ties to even, in the dtype of `ratio`."""
    return ratio.round() if dtype == "int8" else ratio.to(torch.float8_e4m3fn).to(ratio.dtype)


def seen_through(x: torch.Tensor, scheme: Scheme, input_scale: torch.Tensor | None) -> torch.Tensor:
    """x as a product of this scheme sees it: rounded, then multiplied by its scales; itself where it is not rounded."""
    if scheme.activation is None:
        return x
    dtype, group = STORED[scheme.activation], scheme.activation_group
    ratio, scales = scaled(x, dtype, group, input_scale)
    values = rounded(ratio, dtype)
    return values * (scales.repeat_interleave(group, -1)[..., : x.shape[-1]] if group else scales)
