"""What every op of this backend needs to call a kernel: torch first, then the module that shares its OpenMP runtime."""

import torch

from . import _native

DTYPES = {getattr(torch, name): code for name, code in _native.DTYPES.items()}
"""torch dtype -> the kernels' number for it."""


def pointer(x):
    """The address of an array, 0 for None."""
    return 0 if x is None else x.data_ptr()


def matrix(x):
    """x as [rows, width] with unit stride along a row; a copy only where strides allow no such view."""
    x = x.view(1, -1) if x.dim() == 1 else x.flatten(0, -2)
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()
