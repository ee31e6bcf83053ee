"""What every op of this backend needs to call a kernel: torch first, then the module that shares its OpenMP runtime."""

import torch

from . import _native

DTYPES = {getattr(torch, name): code for name, code in _native.DTYPES.items()}
"""torch dtype -> the kernels' number for it."""


def pointer(x):
    """The address of an array, 0 for None."""
    return 0 if x is None else x.data_ptr()


def channels(x):
    """x with unit stride along its last axis; a copy where it has another one."""
    return x if x.stride(-1) == 1 else x.contiguous()


def matrix(x):
    """x as [rows, width] with unit stride along a row; a copy only where strides allow no such view."""
    if x.dim() != 2:
        x = x.view(1, -1) if x.dim() == 1 else x.flatten(0, -2)
    return x if x.stride(1) == 1 else x.contiguous()


def spread_channels(**arrays):
    """A refusal for each array that a kernel reads or writes in place and whose last axis is not its innermost."""
    for name, x in arrays.items():
        if x is not None and x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():
            reason = f"the last stride of {name} is {x.stride(-1)}; its channels must lie side by side"
            yield "LAYOUT", reason, f"keep {name} with the channels as its last axis in memory"
