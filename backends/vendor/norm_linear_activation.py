"""norm_linear_activation as a norm, a product and pointwise kernels of torch, in float32 up to the store."""

import torch
from torch.nn import functional

from ._common import refuse_device
from ._products import dense, quantized

TRAITS = {"deterministic": True, "graph_safe": True, "accumulate": "float32"}

ACTIVATIONS = {
    "none": lambda z: z,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "relu": torch.relu,
    "swiglu": lambda z: _gated(z, functional.silu),
    "geglu": lambda z: _gated(z, functional.gelu),
}


def refuse(x, weight, **options):
    yield from refuse_device(x)


def run(
    x,
    weight,
    *,
    norm="rms",
    norm_weight=None,
    norm_bias=None,
    residual=None,
    bias=None,
    activation="none",
    eps=1e-6,
    return_residual=False,
):
    s = x if residual is None else torch.add(x.float(), residual)
    out, columns = weight.shape
    if s.numel() and out:
        n = _normed(s, norm, norm_weight, norm_bias, eps).reshape(-1, columns)
        # Without a norm, x + residual may exceed what float16 holds.
        dtype = torch.float32 if n.dtype == torch.float32 and norm == "none" else x.dtype
        z = (quantized if hasattr(weight, "scheme") else dense)(n, weight, dtype).view(*x.shape[:-1], out)
    else:
        z = x.new_zeros(*x.shape[:-1], out)
    if bias is not None or activation != "none":
        z = z.float() if bias is None else z.float() + bias
        z = ACTIVATIONS[activation](z)
    y = z.to(x.dtype)
    return (y, s.to(x.dtype)) if return_residual else y


def _normed(s, norm, weight, bias, eps):
    if norm == "none":
        return s
    s, weight, bias = (None if x is None else x.float() for x in (s, weight, bias))
    if norm == "rms":
        return functional.rms_norm(s, s.shape[-1:], weight, eps)
    if s.is_cuda:  # torch's kernel there loses digits where the mean is far from zero
        s = s - s.mean(-1, keepdim=True)
        s = s * torch.rsqrt((s * s).mean(-1, keepdim=True) + eps)
        s = s if weight is None else s * weight
        return s if bias is None else s + bias
    return functional.layer_norm(s, s.shape[-1:], weight, bias, eps)


def _gated(z, activate):
    gate, value = z.chunk(2, -1)
    return activate(gate).mul_(value)
