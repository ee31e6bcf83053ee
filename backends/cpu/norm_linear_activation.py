"""act(norm(x + residual) @ wT + bias), dense or quantized: csrc/cpu/gemm.h.

Many bfloat16 rows of a dense weight are multiplied by oneDNN, which torch brings along: its blocked product of plain
weights is faster than ours from some tens of rows on.  The norm before it is ours; oneDNN applies the activation to
the float32 sums, so that nothing is rounded in between that would not be here.
"""

from functools import cache

import torch

from . import _native
from ._call import DTYPES, matrix, pointer
from ._packing import dense, packed

TRAITS = {"deterministic": True, "accumulate": "float32"}
GATED = ("swiglu", "geglu")
FUSED = {
    "none": ("none", ""),
    "silu": ("swish", ""),
    "relu": ("relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}
"""Activations that oneDNN applies before it rounds: name and algorithm."""
MANY = 64  # rows above which oneDNN is faster


def refuse(x, weight, **options):
    return []


def run(x, weight, *, norm, norm_weight, norm_bias, residual, bias, activation, eps, return_residual):
    gated = activation in GATED
    features = weight.shape[0]
    kept = torch.empty(x.shape, dtype=x.dtype) if return_residual else None
    rows, summand = matrix(x), None if residual is None else matrix(residual)
    gain, shift, added = (None if part is None else part.contiguous() for part in (norm_weight, norm_bias, bias))
    quantized = hasattr(weight, "scheme")
    if not quantized and _by_onednn(rows, summand, weight, norm, gain, activation):
        hidden = rows if norm == "none" else _normalised(rows, gain, summand, kept, eps)
        name, algorithm = FUSED[activation]
        y = torch.ops.mkldnn._linear_pointwise(hidden, weight, added, name, [], algorithm)
        y = y.view(*x.shape[:-1], features)
        return (y, kept) if return_residual else y
    y = torch.empty(*x.shape[:-1], features // 2 if gated else features, dtype=x.dtype)
    form = packed(weight, gated) if quantized else matrix(weight)
    _native.gemm(
        *(form.arguments if quantized else dense(form)),
        _native.NORM[norm], pointer(gain), pointer(shift), eps,
        DTYPES[x.dtype], rows.data_ptr(), rows.stride(0), pointer(summand), 0 if summand is None else summand.stride(0),
        pointer(kept), rows.shape[0], pointer(added), _native.ACTIVATION[activation], y.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return (y, kept) if return_residual else y


def _by_onednn(rows, summand, weight, norm, gain, activation):
    if rows.shape[0] <= MANY or rows.dtype != torch.bfloat16 or activation not in FUSED:
        return False
    plain = summand is None if norm == "none" else norm == "rms" and gain is not None  # a sum would be rounded
    return plain and weight.numel() > 0 and weight.is_contiguous() and _multiplies_bfloat16()


@cache
def _multiplies_bfloat16():
    """Whether this torch has oneDNN, and this processor what its bfloat16 products take."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _normalised(rows, gain, summand, kept, eps):
    """rms_norm(rows + summand) rounded to the dtype of rows; `kept`, where there is one, gets the sum."""
    hidden = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if summand is not None and kept is None:
        kept = torch.empty_like(hidden)
    _native.rms_norm(
        DTYPES[rows.dtype], rows.data_ptr(), rows.stride(0),
        pointer(summand), 0 if summand is None else summand.stride(0), gain.data_ptr(), hidden.data_ptr(),
        pointer(kept), *rows.shape, eps, torch.get_num_threads(),
    )  # fmt: skip
    return hidden
