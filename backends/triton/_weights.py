"""A weight as the kernels read it: every part as it lies, since a GPU has no room for a second copy."""

from dataclasses import dataclass
from typing import Any

import torch

from ._launch import readable


@dataclass(frozen=True)
class Form:
    """The arguments of _product.multiply that describe a weight; None where there is none."""

    kind: str  # dense, int4, int8, mxfp4 or fp8
    shape: tuple[int, int]
    values: torch.Tensor
    scales: Any = None
    zeros: Any = None
    permutation: Any = None
    group: int = 0
    scale_rows: int = 1
    tops: Any = None  # float32 [1, features], the largest scale of each row, where groups have scales; never 0
    rounding: str | None = None  # what x is rounded to
    x_group: int = 0
    input_scale: Any = None
    words: Any = None  # of int4: values as int16 [features, columns / 4], where columns and rows are whole words


def dense(weight):
    weight = readable(weight)
    return Form("dense", tuple(weight.shape), weight if weight.stride(1) == 1 else weight.contiguous())


def form(weight):
    """The Form of a QuantizedWeight, made once and kept on it.  Two threads may both make it; either one serves."""
    if "triton" not in weight.packed:
        if weight.values.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the first call packs the weight; make one before the CUDA graph is captured")
        weight.packed["triton"] = _form(weight)
    return weight.packed["triton"]


def _form(weight):
    scheme, values = weight.scheme, weight.values
    values = values if values.stride(1) == 1 else values.contiguous()
    scales = readable(weight.scales)
    if scheme.granularity == "tensor":
        scales = scales.expand(weight.shape[0], 1)
    return Form(
        kind=scheme.weight,
        shape=weight.shape,
        values=values,
        scales=scales.contiguous(),
        zeros=None if weight.zeros is None else weight.zeros.contiguous(),
        permutation=None if weight.permutation is None else weight.permutation.contiguous(),
        group=scheme.group,
        scale_rows=scheme.group if scheme.granularity == "block" else 1,
        tops=_tops(weight) if scheme.group else None,
        rounding=scheme.activation,
        x_group=scheme.activation_group if scheme.activation else 0,
        input_scale=weight.input_scale,
        words=_words(values) if scheme.weight == "int4" and weight.shape[1] % 4 == 0 else None,
    )


def _words(values):
    whole = values.data_ptr() % 2 == 0 and values.storage_offset() % 2 == 0 and values.stride(0) % 2 == 0
    return values.view(torch.int16) if whole else None


def _tops(weight):
    scheme, features, scales = weight.scheme, weight.shape[0], weight.scales
    if scheme.weight == "mxfp4":  # halves, since the kernels' codes are doubled
        scales = torch.exp2(scales.double() - 128)
    if not scales.shape[1]:
        return torch.ones(1, features, device=scales.device)
    tops = scales.float().abs().amax(1)
    if scheme.granularity == "block":
        tops = tops.repeat_interleave(scheme.group)[:features]
    return torch.where(tops < torch.finfo(torch.float32).tiny, 1, tops)[None].contiguous()
