"""Round to nearest: the quantizer that needs no data, and the one that others are compared with."""

from typing import Any

import torch

from llmkernels.arrays import family, to_torch
from llmkernels.contract import FLOATS
from llmkernels.quant.activation import LARGEST, LOWEST, SMALLEST
from llmkernels.quant.codes import E8M0_BIAS, e2m1_codes, pack
from llmkernels.quant.scheme import BLOCK, Scheme, scheme
from llmkernels.quant.weight import QuantizedWeight
from llmkernels.shapes import dtype_name


def quantize(
    weight: Any, to: Any, *, permutation: Any = None, input_scale: Any = None, scale_dtype: torch.dtype = torch.float32
) -> QuantizedWeight:
    """Round a dense weight to a scheme, each value to the nearest one that the scheme can write.

        int4, int8, symmetric   scale = max(max w / high, min w / low), q = round(w / scale); -8..7 or -128..127
        with zero points        scale = (max(w, 0) - min(w, 0)) / (high - low), zero = the level where 0 lies
        fp8                     scale = max |w| / 448
        mxfp4                   scale = the smallest power of two at which max |w| / scale <= 7, which rounds to 6

    over the columns, rows or blocks that share a scale.  Ties go to even.  Where all of them are 0, or so small that
    the scale would be below the smallest normal number, the scale is 1 and q is 0.  No value is off by more than half
    the step to its neighbour (in fp8 and mxfp4 steps grow with the value).  With float32 scales, quantizing what was
    dequantized changes nothing.

    Args:
        weight: [out, in], float, on any device.
        to: a Scheme or its name, "w4a16_g128".
        permutation: of schemes with act-order: the feature of x that each stored column belongs to.
        input_scale: of schemes with a calibrated scale of the activations: that scale.
        scale_dtype: of the scales of int4 and int8, which are rounded up to it before anything is divided by them.

    Raises:
        ValueError: the weight is no matrix of finite floats, or an argument does not fit the scheme.
    """
    to, weight = scheme(to), to_torch(weight)
    _check(weight, to, permutation, input_scale, scale_dtype)
    family("quantize", {"weight": weight})
    if weight.is_meta:
        raise ValueError("quantize: weight is on meta, where tensors have no values; load it first")
    w = weight.detach().float()
    if not bool((finite := w.isfinite()).all()):
        at = [int(i) for i in (~finite).nonzero()[0]]
        raise ValueError(
            f"quantize: weight{at} is {float(weight[tuple(at)])}; weights are finite numbers within float32"
        )
    if permutation is not None:
        permutation = torch.as_tensor(to_torch(permutation), device=w.device).int()
        if sorted(permutation.tolist()) != list(range(w.shape[1])):
            raise ValueError(
                f"quantize: permutation is {permutation.tolist()!r:.60}; name each of 0 to {w.shape[1] - 1} once"
            )
        w = w[:, permutation.long()]
    if input_scale is not None:
        input_scale = torch.as_tensor(input_scale, dtype=torch.float32, device=w.device)
        if input_scale.numel() != 1:
            raise ValueError(f"quantize: input_scale has shape {tuple(input_scale.shape)}; give one number")
        input_scale = input_scale.reshape(1)
    write = {"int4": _integers, "int8": _integers, "fp8": _fp8, "mxfp4": _mxfp4}[to.weight]
    values, scales, zeros = write(w, to, scale_dtype)
    quantized = QuantizedWeight(values, scales, zeros, permutation, to, input_scale, w.shape[1])
    quantized.check_values()
    return quantized


def _check(weight: torch.Tensor, to: Scheme, permutation: Any, input_scale: Any, scale_dtype: torch.dtype) -> None:
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or not weight.dtype.is_floating_point:
        what = f"{dtype_name(weight)} {tuple(weight.shape)}" if hasattr(weight, "shape") else repr(weight)[:80]
        raise ValueError(f"quantize: weight is {what}; pass a float matrix [out, in]")
    for name, given, wanted in (
        ("permutation", permutation, to.act_order),
        ("input_scale", input_scale, not to.dynamic),
    ):
        if wanted and given is None:
            raise ValueError(f"quantize: {name} is missing; the scheme {to} needs it")
        if given is not None and not wanted:
            raise ValueError(f"quantize: {name} is given, but the scheme {to} has none; leave it out")
    if str(scale_dtype).removeprefix("torch.") not in FLOATS:
        raise ValueError(f"quantize: scale_dtype is {scale_dtype}; use torch.float32, torch.bfloat16 or torch.float16")


def _integers(w: torch.Tensor, to: Scheme, scale_dtype: torch.dtype) -> tuple:
    nibbles = to.weight == "int4"
    low, high = (-8, 7) if nibbles else (-128, 127)
    grouped = _grouped(w, to.group)
    top, bottom = grouped.amax(-1).clamp(min=0), grouped.amin(-1).clamp(max=0)
    spread = (top / 2 - bottom / 2) / ((high - low) / 2)  # halves, because top - bottom may overflow
    exact = torch.maximum(top / high, bottom / low) if to.symmetric else spread
    scales = _rounded_up(torch.where(exact < SMALLEST, 1, exact), scale_dtype)
    if not bool(scales.isfinite().all()):
        raise ValueError(f"quantize: a scale is {float(exact.max()):.3g}, too large for {scale_dtype}; use a wider one")
    step = scales.float()
    zeros = torch.zeros_like(step) if to.symmetric else torch.round(low - bottom / step).clamp(low, high)
    q = (torch.round(grouped / step[..., None]) + zeros[..., None]).clamp(low, high)
    q = q.flatten(1)[:, : w.shape[1]]
    if nibbles:  # stored unsigned
        q, zeros = q + 8, zeros + 8
    kind = torch.uint8 if nibbles else torch.int8
    values = pack(q) if nibbles else q.to(kind)
    return values, scales, None if to.symmetric else zeros.to(kind)


def _rounded_up(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Positive scales in a dtype, none smaller than it was: a smaller one would cut off the largest values."""
    nearest = scales.to(dtype)
    if dtype == scales.dtype:
        return nearest
    next_up = (nearest.view(torch.int16) + 1).view(dtype)  # the next number, since both are written in 16 bits
    return torch.where(nearest.float() < scales, next_up, nearest)


def _fp8(w: torch.Tensor, to: Scheme, scale_dtype: torch.dtype) -> tuple:
    rows, columns = w.shape
    down, across, height, width = {
        "tensor": (1, 1, max(rows, 1), max(columns, 1)),
        "row": (rows, 1, 1, max(columns, 1)),
        "block": (-(-rows // BLOCK), -(-columns // BLOCK), BLOCK, BLOCK),
    }[to.granularity]
    tiles = torch.nn.functional.pad(w, (0, across * width - columns, 0, down * height - rows))
    tiles = tiles.unflatten(1, (across, width)).unflatten(0, (down, height))
    scales = tiles.abs().amax((1, 3)) / LARGEST["float8_e4m3fn"]
    scales = torch.where(scales < SMALLEST, 1, scales)
    ratio = (tiles / scales[:, None, :, None]).clamp(LOWEST["float8_e4m3fn"], LARGEST["float8_e4m3fn"])
    return ratio.flatten(2).flatten(0, 1)[:rows, :columns].contiguous().to(torch.float8_e4m3fn), scales, None


def _mxfp4(w: torch.Tensor, to: Scheme, scale_dtype: torch.dtype) -> tuple:
    grouped = _grouped(w, to.group)
    peak = grouped.abs().amax(-1)
    fraction, exponent = torch.frexp(peak)  # peak = fraction * 2 ** exponent, fraction in [1/2, 1)
    exponent = torch.where(peak == 0, 0, exponent - 3 + (fraction > 7 / 8)).clamp(-E8M0_BIAS, E8M0_BIAS)
    q = torch.ldexp(grouped.double(), -exponent[..., None])
    return pack(e2m1_codes(q.flatten(1)[:, : w.shape[1]])), (exponent + E8M0_BIAS).to(torch.uint8), None


def _grouped(w: torch.Tensor, group: int) -> torch.Tensor:
    """[rows, columns] -> [rows, groups, group], the last group filled up with zeros; group 0 is the whole row."""
    columns = w.shape[1]
    width = group or max(columns, 1)
    groups = -(-columns // width) if group else 1
    return torch.nn.functional.pad(w, (0, groups * width - columns)).unflatten(1, (groups, width))
