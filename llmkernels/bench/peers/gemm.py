"""Products in plain torch: weights dequantized beforehand, norm and activation apart, LoRA adapter by adapter."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from llmkernels.bench.peers import Call, compiled_frozen, eager, peer
from llmkernels.quant.codes import unpack

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
    """Weights that stay small, unpacked for each product.  Not on a CPU, where it takes a hundred times as long."""
    x, weight, bias = call["x"], call["weight"], call["bias"]
    if weight.scheme.activation or x.device.type == "cpu":
        return None
    return lambda: F.linear(x, weight.dequantize(x.dtype), bias)


@peer("quantized_gemm", "torch int4")
def int4(call: Call) -> Callable[[], Any] | None:
    """torch's own 4-bit kernel on a CPU; in float32 it exists, a hundred times slower."""
    x, weight, bias = call["x"], call["weight"], call["bias"]
    scheme, (out, columns) = weight.scheme, weight.shape
    plain = scheme.weight == "int4" and scheme.symmetric and not scheme.act_order and scheme.activation is None
    whole = scheme.group and columns % scheme.group == 0 and out % 16 == 0
    if not plain or not whole or x.ndim != 2 or x.dtype != torch.bfloat16 or x.device.type != "cpu":
        return None
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack(weight.values, columns).int(), 2)
    scales = weight.scales.t().to(x.dtype)
    both = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()  # scale * (q - 8) + zero

    def run() -> torch.Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, scheme.group, both)
        return y if bias is None else y + bias

    return run


def _packs_int8() -> bool:
    """Whether oneDNN's int8 kernels can be used: without VNNI they saturate, and the answers are wrong."""
    return torch.cpu._is_vnni_supported()


def _int8_by_row(call: Call) -> bool:
    scheme = call["weight"].scheme
    plain = scheme.weight == "int8" and scheme.activation == "int8" and scheme.dynamic and scheme.symmetric
    return plain and scheme.granularity == "row" and call["x"].ndim == 2


@peer("quantized_gemm", "torch, int8 x int8")
def int8(call: Call) -> Callable[[], Any] | None:
    x, weight, bias = call["x"], call["weight"], call["bias"]
    if not _int8_by_row(call) or (x.is_cuda and x.shape[0] <= 16) or (not x.is_cuda and _packs_int8()):
        return None  # _int_mm on a GPU wants more than 16 rows; on a CPU oneDNN is several times as fast

    def run() -> torch.Tensor:
        levels, scales = _levels(x)
        product = torch._int_mm(levels.to(torch.int8), weight.values.t())
        y = (product * scales * weight.scales.float().t()).to(x.dtype)
        return y if bias is None else y + bias

    return run


def _levels(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x in whole levels, still float, and the size of a level in each row, float32."""
    scales = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).float() / 127
    return x.div(scales).round_(), scales


@peer("quantized_gemm", "oneDNN int8")
def onednn(call: Call) -> Callable[[], Any] | None:
    """oneDNN on a weight it has packed before; x is rounded in the call."""
    return _onednn(call, rounded_before=False)


@peer("quantized_gemm", "oneDNN int8, x rounded before")
def onednn_product(call: Call) -> Callable[[], Any] | None:
    """Its product alone, for a bound: who is given x rounded does less than the op asks for."""
    return _onednn(call, rounded_before=True)


def _onednn(call: Call, rounded_before: bool) -> Callable[[], Any] | None:
    x, weight, bias = call["x"], call["weight"], call["bias"]
    if not _int8_by_row(call) or x.device.type != "cpu" or not _packs_int8():
        return None
    packed = torch.ops.onednn.qlinear_prepack(weight.values.contiguous(), None)
    scales, zeros = weight.scales.float().flatten(), torch.zeros(weight.shape[0], dtype=torch.int64)
    before = _shifted(x) if rounded_before else None

    def run() -> torch.Tensor:
        levels, size = before or _shifted(x)
        y = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        y = y.mul_(size).to(x.dtype)
        return y if bias is None else y + bias

    return run


def _shifted(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x in levels of each row, shifted to unsigned: what oneDNN takes."""
    levels, scales = _levels(x)
    return levels.add_(128).to(torch.uint8), scales


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


@peer("norm_linear_activation", "torch.compile, frozen")
def frozen(call: Call) -> Callable[[], Any] | None:
    """The same with the weights as constants of the compiled code, which oneDNN then packs beforehand."""
    if hasattr(call["weight"], "scheme") or call["x"].device.type != "cpu":
        return None
    held = {name: value for name, value in call.items() if name in ("weight", "norm_weight", "norm_bias", "bias")}
    return compiled_frozen(norm_linear_activation, held, {n: v for n, v in call.items() if n not in held})


@eager("lora_gemm", compiled=False, takes=lambda call: call["x"].ndim == 2)
def lora_gemm(y, x, a, b, adapters, scales):
    """One adapter after the other, as PEFT does it for a batch that mixes them."""
    for adapter in adapters.unique().tolist():
        if adapter >= 0:
            rows = (adapters == adapter).nonzero().flatten()
            y[rows] += (scales[adapter] * (x[rows] @ a[adapter].T @ b[adapter].T)).to(y.dtype)
