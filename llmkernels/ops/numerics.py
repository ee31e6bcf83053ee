"""The few words that every reference is written in."""

import torch

FP8_MAX = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in the precision a reference computes in: float64 stays, everything else becomes float32."""
    return x if x.dtype == torch.float64 else x.float()


def itemsize(x: torch.Tensor) -> int:
    """Bytes of one element."""
    return x.dtype.itemsize
