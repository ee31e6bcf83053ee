"""act(norm(x + residual) @ wT + bias), dense or quantized: csrc/cpu/gemm.h."""

import torch

from . import _native
from ._call import DTYPES, matrix, pointer
from ._packing import dense, packed

TRAITS = {"deterministic": True, "accumulate": "float32"}
GATED = ("swiglu", "geglu")


def refuse(x, weight, **options):
    return []


def run(x, weight, *, norm, norm_weight, norm_bias, residual, bias, activation, eps, return_residual):
    gated = activation in GATED
    features = weight.shape[0]
    y = torch.empty(*x.shape[:-1], features // 2 if gated else features, dtype=x.dtype)
    kept = torch.empty(x.shape, dtype=x.dtype) if return_residual else None
    rows, summand = matrix(x), None if residual is None else matrix(residual)
    gain, shift, added = (None if part is None else part.contiguous() for part in (norm_weight, norm_bias, bias))
    quantized = hasattr(weight, "scheme")
    form = packed(weight, gated) if quantized else matrix(weight)
    _native.gemm(
        *(form.arguments if quantized else dense(form)),
        _native.NORM[norm], pointer(gain), pointer(shift), eps,
        DTYPES[x.dtype], rows.data_ptr(), rows.stride(0), pointer(summand), 0 if summand is None else summand.stride(0),
        pointer(kept), rows.shape[0], pointer(added), _native.ACTIVATION[activation], y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return (y, kept) if return_residual else y
