"""Products in plain torch: weights dequantized beforehand, norm and activation apart, LoRA adapter by adapter."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from llmkernels.bench.peers import Call, eager, peer

ACTIVATIONS = {
    "none": lambda y: y,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "relu": F.relu,
    "swiglu": lambda y: F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1],
    "geglu": lambda y: F.gelu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1],
}


@peer("quantized_gemm", "torch, dense")
def dense(call: Call) -> Callable[[], Any] | None:
    """What quantization has to beat: the weight in the dtype of x, four times as many bytes."""
    x, bias = call["x"], call["bias"]
    if call["weight"].scheme.activation:
        return None  # another product: x is not rounded
    weight = call["weight"].dequantize(x.dtype)
    return lambda: F.linear(x, weight, bias)


@peer("quantized_gemm", "torch, dequantized in the call")
def dequantized(call: Call) -> Callable[[], Any] | None:
    x, weight, bias = call["x"], call["weight"], call["bias"]
    if weight.scheme.activation:
        return None
    return lambda: F.linear(x, weight.dequantize(x.dtype), bias)


@peer("quantized_gemm", "torch, int8 x int8")
def int8(call: Call) -> Callable[[], Any] | None:
    x, weight, bias = call["x"], call["weight"], call["bias"]
    scheme = weight.scheme
    plain = scheme.weight == "int8" and scheme.activation == "int8" and scheme.dynamic and scheme.symmetric
    if not plain or scheme.granularity != "row" or x.ndim != 2 or (x.is_cuda and x.shape[0] <= 16):
        return None  # _int_mm on a GPU wants more than 16 rows

    def run() -> torch.Tensor:
        scales = x.abs().amax(-1, keepdim=True).float() / 127
        product = torch._int_mm((x / scales).round().to(torch.int8), weight.values.t())
        y = (product * scales * weight.scales.float().t()).to(x.dtype)
        return y if bias is None else y + bias

    return run


@eager(
    "norm_linear_activation",
    takes=lambda call: not hasattr(call["weight"], "scheme"),
)
def norm_linear_activation(x, weight, norm, norm_weight, norm_bias, residual, bias, activation, eps, return_residual):
    total = x if residual is None else x + residual
    hidden = total
    if norm == "rms":
        hidden = F.rms_norm(total, total.shape[-1:], norm_weight, eps)
    elif norm == "layer":
        hidden = F.layer_norm(total, total.shape[-1:], norm_weight, norm_bias, eps)
    y = ACTIVATIONS[activation](F.linear(hidden, weight, bias))
    return (y, total) if return_residual else y


@eager("lora_gemm", compiled=False, takes=lambda call: call["x"].ndim == 2)
def lora_gemm(y, x, a, b, adapters, scales):
    """One adapter after the other, as PEFT does it for a batch that mixes them."""
    for adapter in adapters.unique().tolist():
        if adapter >= 0:
            rows = (adapters == adapter).nonzero().flatten()
            y[rows] += (scales[adapter] * (x[rows] @ a[adapter].T @ b[adapter].T)).to(y.dtype)
