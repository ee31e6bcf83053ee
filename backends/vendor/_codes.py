"""Quantized weights in the forms that torch's kernels want, made once and kept on the weight."""

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from . import _common

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the value of each code
BLOCK = 128  # rows and columns that share a scale in fp8_block


class Codes(NamedTuple):
    """w[n, j] = values[n, j] * scales[n, j // group].  values are exact in every float dtype that has 8 bits.

    values: [out, columns], columns filled up with zeros to whole groups; scales: float32 [out, groups].
    group 0: one scale for the row, [out or 1, 1]; scales None: values are the weight.
    """

    values: torch.Tensor
    scales: torch.Tensor | None = None
    group: int = 0


def kept(weight, kind, make):
    """make(weight), made once and kept on the weight itself."""
    mine = weight.packed.setdefault("vendor", {})
    if kind not in mine:
        if weight.values.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("the first call packs the weight; make one before the CUDA graph is captured")
        mine[kind] = make(weight)
    return mine[kind]


def codes(weight):
    """A QuantizedWeight as Codes, in stored column order."""
    return kept(weight, "codes", _codes)


def _codes(weight):
    kind, (rows, columns) = weight.scheme.weight, weight.shape
    if kind == "fp8":
        values = weight.values.to(torch.bfloat16)  # torch converts from e4m3 40 times slower than from bfloat16
        if weight.scheme.granularity != "block":
            return Codes(values, weight.scales)
        return Codes(_filled(values, BLOCK), weight.scales.repeat_interleave(BLOCK, 0)[:rows].contiguous(), BLOCK)
    group = weight.scheme.group
    if kind == "mxfp4":
        table = torch.tensor(E2M1, dtype=torch.int8, device=weight.values.device)
        scales = torch.exp2(weight.scales.double() - 128).float()  # the exponent's bias is 127; E2M1 is doubled
        return Codes(_filled(table[_nibbles(weight.values, columns).long()], group), scales, group)
    if kind == "int4":
        values = _nibbles(weight.values, columns).to(torch.int8)
        zeros = 8 if weight.zeros is None else _spread(weight.zeros.to(torch.int8), group, columns)
        values = values - zeros
    else:
        values = weight.values
        if weight.zeros is not None:
            values = values.short() - _spread(weight.zeros.short(), group, columns)
    return Codes(_filled(values, group), weight.scales.float(), group)


def int4_kernel(weight):
    """(packed, group, scales and offsets) of a symmetric weight, for torch's int4 kernels, which want bfloat16."""
    return kept(weight, "int4", _int4_kernel)


def _int4_kernel(weight):
    rows, columns = weight.shape
    group = weight.scheme.group or 128  # a scale for the whole row is repeated
    q = pad(_nibbles(weight.values, columns), (0, -columns % 128, 0, -rows % 16))
    scales = weight.scales.float()
    both = torch.stack([scales, torch.zeros_like(scales)], -1)
    groups = q.shape[1] // group
    both = pad(both, (0, 0, 0, groups - both.shape[1])) if weight.scheme.group else both.expand(-1, groups, -1)
    both = pad(both, (0, 0, 0, 0, 0, -rows % 16)).transpose(0, 1).bfloat16().contiguous()  # [groups, out, 2]
    if _common.on_host(q):
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1), group, both
    return torch.ops.aten._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8), group, both


def _nibbles(packed, columns):
    return torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :columns]


def _spread(per_group, group, columns):
    return per_group.repeat_interleave(group, 1)[:, :columns] if group else per_group


def _filled(values, group):
    more = -values.shape[1] % group if group else 0
    return (pad(values, (0, more)) if more else values).contiguous()
