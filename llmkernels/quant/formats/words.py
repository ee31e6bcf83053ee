"""What the formats share: codes in words of 32 bits, groups, and the canonical form of integers."""

from collections.abc import Mapping
from typing import Any

import torch

from llmkernels.quant.codes import pack, unpack
from llmkernels.quant.scheme import Scheme
from llmkernels.quant.weight import QuantizedWeight

Shapes = dict[str, tuple[int, ...]]
Tensors = Mapping[str, torch.Tensor]


def scheme_of(weight: str, group_size: int, **more: Any) -> Scheme:
    """A Scheme whose group size comes from a checkpoint, -1 for a whole row."""
    return Scheme(weight, "group" if group_size > 0 else "row", max(group_size, 0), **more)


def groups_of(group_size: int, columns: int) -> int:
    return -(-columns // group_size) if group_size > 0 else 1


def integers(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    kind: Scheme,
    columns: int,
    permutation: torch.Tensor | None = None,
) -> QuantizedWeight:
    """codes and zeros unsigned, in the order in which columns are stored."""
    nibbles = kind.weight == "int4"
    if kind.symmetric:
        zeros = None
    elif zeros is not None:
        zeros = (zeros.to(torch.uint8) if nibbles else signed(zeros)).contiguous()
    values = pack(codes) if nibbles else signed(codes).contiguous()
    return QuantizedWeight(values, scales.contiguous(), zeros, permutation, kind, in_features=columns)


def signed(codes: torch.Tensor) -> torch.Tensor:
    """0 to 255 as -128 to 127."""
    return (codes.int() - 128).to(torch.int8)


def fields(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [n, words] -> uint8 [n, words * 32/bits], the lowest bits of a word first."""
    found = words.contiguous().view(torch.uint8)
    return found if bits == 8 else unpack(found, 2 * found.shape[1])


def in_groups(layer: str, name: str, groups: torch.Tensor, size: int, ordered: bool) -> torch.Tensor:
    """The features of x in the order of their groups, int32 [in]; `groups` int [in] is the group of each feature.

    Raises:
        ValueError: a group has more or fewer features than the others; or, if `ordered`, they are not in order already.
    """
    groups = groups.long()
    order = torch.arange(groups.shape[0], device=groups.device) if ordered else torch.argsort(groups, stable=True)
    if not torch.equal(groups[order], torch.arange(groups.shape[0], device=groups.device) // size):
        raise ValueError(
            f"{layer}.{name} does not give {size} features to each group{' in order' * ordered}; set act-order "
            "(desc_act, actorder) in quantization_config as it was when the checkpoint was made, or quantize it again"
        )
    return order.int()
