"""How close is close: an output against the float64 oracle and the reference in the call's own dtype."""

import numpy as np
import torch

from llmkernels.memory import bits
from llmkernels.shapes import dtype_name

QUANTIZED = {torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2}
FLOAT32_ROUNDOFF = 2.0**-24


STEPS = 4  # roundings beside the sum: a scale, an activation, a bias, the epilogue


def compare(
    name: str,
    got: torch.Tensor,
    want: torch.Tensor,
    near: torch.Tensor,
    original: torch.Tensor | None = None,
    terms: float = 1,
) -> tuple[list[str], float, float]:
    """Complaints about `got`, its largest error and the tolerance there.

    Args:
        want: the oracle, float64.
        near: the reference in the call's own dtype.
        original: what a written argument held before; where `want` left it, `got` must have too, bit for bit.
        terms: how many products an output sums.  The error of `near` is one draw from a distribution and may be
            lucky, even zero; it counts as at least what a float32 sum in another order is expected to be off by.
    """
    if got.shape != near.shape or got.dtype != near.dtype:
        says = f"the contract says {dtype_name(near)} {tuple(near.shape)}"
        return [f"{name} is {dtype_name(got)} {tuple(got.shape)}; {says}"], np.inf, 0.0
    complaints = []
    got, want, near = (_ends(x) for x in (got, want, near))
    if original is not None:
        original = _ends(original)
        pairs = (want, original.to(want.dtype)), (got, original)  # in `near` a small update may round to nothing
        kept, same = ((bits(x) == bits(o)).view(-1, x.dtype.itemsize).all(1) for x, o in pairs)
        if bool((kept & ~same).any()):
            index = np.unravel_index(int((kept & ~same).int().argmax()), tuple(got.shape))
            complaints.append(f"{name} was written at {tuple(map(int, index))}, which the call does not touch")
        if got.dtype in QUANTIZED:  # stored rounded, in the oracle as well: one of the two roundings of the same value
            equal = (bits(got) == bits(near)) | (bits(got) == bits(want))
            if not bool(equal.all()):
                complaints.append(f"{name} holds {int((~equal).sum())} wrong bytes")
            return complaints, 0.0, 0.0
    wrong, error, tolerance = _worst(got, want.double(), near.double(), terms)
    if wrong:
        complaints.append(f"{name} {wrong}")
    return complaints, error, tolerance


def _ends(x: torch.Tensor) -> torch.Tensor:
    """x, contiguous; of an array of more than 2^28 elements only the first and last rows, where its cases lie."""
    return x.contiguous() if x.numel() < 2**28 else torch.cat([x[:64], x[-64:]])


def _worst(got: torch.Tensor, want: torch.Tensor, near: torch.Tensor, terms: float) -> tuple[str, float, float]:
    dtype, value = got.dtype, got.double()
    if got.numel() == 0:
        return "", 0.0, 0.0
    special = ~torch.isfinite(want)
    if not torch.equal(torch.nan_to_num(value[special], nan=0.5), torch.nan_to_num(want[special], nan=0.5)) or bool(
        (~torch.isfinite(value[~special])).any()
    ):
        bad = (value.isnan() != want.isnan()) | (value.isinf() != want.isinf()) | (want.isinf() & (value != want))
        index = tuple(int(i) for i in bad.nonzero()[0]) if bool(bad.any()) else ()
        return f"is {float(value[index])} at {index}; the oracle says {float(want[index])}", np.inf, 0.0
    value, want, near = (
        torch.where(special, 0, x).reshape(-1, got.shape[-1] if got.ndim else 1) for x in (value, want, near)
    )
    size = want.abs().amax(1, keepdim=True)
    distance = (value - want).abs()
    if not dtype.is_floating_point or dtype in QUANTIZED:
        allowed = _half_unit(dtype, want) + 2 * FLOAT32_ROUNDOFF * 4 * want.abs()
    else:
        relative = ((near - want).abs().amax(1, keepdim=True) / size).nan_to_num(0, 0, 0).max()
        relative = relative.clamp(min=(STEPS + terms**0.5) * FLOAT32_ROUNDOFF)
        allowed = (2 * relative + torch.finfo(dtype).eps / 2) * size
    ratio = (distance / allowed.expand_as(distance)).nan_to_num(0, torch.inf)
    at = np.unravel_index(int(ratio.argmax()), tuple(distance.shape))
    scale = max(float(size[at[0]]), 1e-300)
    error, tolerance = float(distance[at]) / scale, float(allowed.expand_as(distance)[at]) / scale
    if ratio[at] <= 1:
        return "", error, tolerance
    index = tuple(int(i) for i in np.unravel_index(int(ratio.argmax()), tuple(got.shape)))
    return f"is {float(value[at]):.6g} at {index}; the oracle says {float(want[at]):.6g}", error, tolerance


def _half_unit(dtype: torch.dtype, want: torch.Tensor) -> torch.Tensor:
    """Half the gap between neighbours of an output dtype: what rounding to nearest may cost."""
    if not dtype.is_floating_point:
        return torch.full_like(want, 0.5)
    info = torch.finfo(dtype)
    return torch.clamp(want.abs() * info.eps / 2, min=info.tiny * info.eps / 2)
