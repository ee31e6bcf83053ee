"""Weights as csrc/cpu/gemm_panel.h reads them: panels of 64 channels, packed once, kept in weight.packed."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from . import _native
from ._call import DTYPES, pointer

PANEL = 64
E8M0_BIAS = 127
FP8_AS_HALF = 256.0  # kernels read e4m3 as float16 of another bias: numbers 256 times too small


@dataclass(frozen=True)
class Packed:
    """The arguments of the kernel that describe a weight, and the arrays they point into."""

    arguments: tuple
    arrays: tuple


def packed(weight, gated):
    """The packed form of a QuantizedWeight; `gated` puts 32 channels of the gate beside the 32 that they gate.

    Two threads that pack the same weight at the same time do the work twice, and either result serves.
    """
    forms = weight.packed.setdefault("cpu", {})
    if gated not in forms:
        forms[gated] = _pack(weight, gated)
    return forms[gated]


def dense(weight):
    """The arguments that describe a dense weight [features, columns]; its columns must have unit stride."""
    nothing = (0, 0, 0, 0, 0)  # scales_dtype, scales, zero_points, group, permutation
    return (_native.STORAGE["dense"], weight.data_ptr(), weight.stride(0), *nothing, *weight.shape, 0, 0, 0)


def _pack(weight, gated):
    scheme, (features, columns) = weight.scheme, weight.shape
    channels = _channels(features, gated)
    storage = _storage(scheme)
    values = _store(storage)(_rows(weight.values.view(torch.uint8), channels), columns)
    scales, zeros = _scales(weight), weight.zeros
    if storage == "float8":  # a NaN among the codes makes its output NaN, and so does a NaN among the scales
        broken = ((weight.values.view(torch.uint8) & 127) == 127).any(1)
        scales = torch.where(broken[:, None], torch.nan, scales) if bool(broken.any()) else scales
    scales = _panels(_rows(scales, channels))
    zeros = None if zeros is None else _panels(_rows(zeros.view(torch.int8), channels))
    permutation = None if weight.permutation is None else weight.permutation.contiguous()
    arguments = (
        _native.STORAGE[storage], values.data_ptr(), 0, DTYPES[scales.dtype], scales.data_ptr(), pointer(zeros),
        scheme.group, pointer(permutation), features, columns, _native.ROUNDING[scheme.activation or "none"],
        scheme.activation_group, pointer(weight.input_scale),
    )  # fmt: skip
    return Packed(arguments, (values, scales, zeros, permutation, weight.input_scale))


def _storage(scheme):
    if scheme.weight == "mxfp4":
        return "fp4"
    if scheme.weight == "fp8":
        return "float8"
    return scheme.weight + ("_products" if scheme.activation else "")


def _channels(features, gated):
    """The feature of every channel of every panel, [panels, 64]; -1 where a panel has channels to spare."""
    if not gated:
        return functional.pad(torch.arange(features), (0, -features % PANEL), value=-1).view(-1, PANEL)
    half, width = features // 2, PANEL // 2
    gate = functional.pad(torch.arange(half), (0, -half % width), value=-1).view(-1, width)
    return torch.cat([gate, torch.where(gate < 0, -1, gate + half)], 1)


def _rows(part, channels):
    """part[features, n] as [panels, 64, n], zeros where there is no feature."""
    taken = part[channels.clamp(min=0).flatten()].unflatten(0, tuple(channels.shape)) if part.shape[0] else None
    if taken is None:
        return part.new_zeros(*channels.shape, part.shape[1])
    return torch.where((channels < 0)[..., None], torch.zeros((), dtype=part.dtype), taken)


def _panels(part):
    """[panels, 64, groups] -> [panels, groups, 64]."""
    return part.transpose(1, 2).contiguous()


def _nibbles(bytes_, columns):
    """[panels, 64, columns / 2] -> [panels, columns / 8, 64, 4]: the words that lanes load."""
    padded = functional.pad(bytes_, (0, -bytes_.shape[2] % 4))
    return padded.unflatten(2, (-1, 4)).transpose(1, 2).contiguous()


def _quads(bytes_, columns):
    """[panels, 64, columns] -> [panels, columns / 4, 64, 4]."""
    padded = functional.pad(bytes_, (0, -columns % 8))
    return padded.unflatten(2, (-1, 4)).transpose(1, 2).contiguous()


def _columns(bytes_, columns):
    """[panels, 64, columns] -> [panels, columns, 64]."""
    return functional.pad(bytes_, (0, -columns % 8)).transpose(1, 2).contiguous()


def _twos(bytes_, columns):
    """[panels, 64, columns] -> [panels, columns / 2, 64, 2]."""
    padded = functional.pad(bytes_, (0, -columns % 8))
    return padded.unflatten(2, (-1, 2)).transpose(1, 2).contiguous()


def _store(storage):
    """The function that lays out values for the instruction set whose kernels will read them."""
    if storage in ("int4", "int4_products", "fp4"):
        return _nibbles
    if storage == "int8_products":
        return _quads
    return _twos if _native.isa() == "avx512" else _columns


def _scales(weight):
    """The scale of every feature and group, [features, groups], in a float dtype."""
    scheme, (features, _) = weight.scheme, weight.shape
    if scheme.weight == "mxfp4":  # bfloat16 has the exponents of e8m0
        return torch.exp2(weight.scales.double() - E8M0_BIAS).to(torch.bfloat16)
    if scheme.weight != "fp8":
        return weight.scales
    scales = weight.scales * FP8_AS_HALF
    if scheme.granularity == "block":
        return scales.repeat_interleave(scheme.group, 0)[:features]
    return scales.expand(features, 1)
