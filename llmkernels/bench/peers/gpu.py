"""Peers that only a GPU has: cuBLAS on FP8, and gemlite's and Liger's Triton kernels where they are installed."""

from collections.abc import Callable
from typing import Any

import torch

from llmkernels.bench.peers import Call, peer
from llmkernels.quant.codes import unpack

E4M3_TOP = 448.0


@peer("quantized_gemm", "torch._scaled_mm")
def scaled_mm(call: Call) -> Callable[[], Any] | None:
    """FP8 with a scale for each row of both sides; x is rounded in the call, by torch one operation after the other."""
    return _scaled_mm(call, rounded_before=False)


@peer("quantized_gemm", "torch._scaled_mm, x rounded before")
def scaled_product(call: Call) -> Callable[[], Any] | None:
    """Its product alone, for a bound: who is given x rounded does less than the op asks for."""
    return _scaled_mm(call, rounded_before=True)


def _scaled_mm(call: Call, rounded_before: bool) -> Callable[[], Any] | None:
    x, weight, bias = call["x"], call["weight"], call["bias"]
    scheme = weight.scheme
    rows = scheme.weight == scheme.activation == "fp8" and scheme.granularity == "row" and scheme.dynamic
    if not rows or not x.is_cuda or x.ndim != 2 or x.dtype != torch.bfloat16 or any(n % 16 for n in weight.shape):
        return None
    right, scales = weight.values.t(), weight.scales.float().reshape(1, -1)
    before = _rounded(x) if rounded_before else None

    def run() -> torch.Tensor:
        left, size = before or _rounded(x)
        y = torch._scaled_mm(left, right, size, scales, out_dtype=x.dtype, use_fast_accum=True)
        return y if bias is None else y + bias

    return run


def _rounded(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    size = x.abs().amax(-1, keepdim=True).float() / E4M3_TOP
    return (x / size).clamp(-E4M3_TOP, E4M3_TOP).to(torch.float8_e4m3fn), size


@peer("quantized_gemm", "gemlite", needs="gemlite")
def gemlite(call: Call) -> Callable[[], Any] | None:
    """Its own choice of kernel and tiles, from the tables that it ships for the GPU."""
    x, weight, bias = call["x"], call["weight"], call["bias"]
    scheme = weight.scheme
    plain = scheme.weight == "int4" and scheme.group and scheme.activation is None and not scheme.act_order
    if not plain or not x.is_cuda or x.ndim != 2 or x.dtype == torch.float32:
        return None
    from gemlite.helper import A16W4_HQQ_INT

    zeros = torch.full_like(weight.scales, 8) if weight.zeros is None else weight.zeros.to(weight.scales.dtype)
    codes = unpack(weight.values, weight.shape[1])
    layer = A16W4_HQQ_INT(device=x.device, dtype=x.dtype).from_weights(codes, weight.scales.to(x.dtype), zeros, bias)
    return lambda: layer(x)


@peer("rms_norm", "Liger", needs="liger_kernel")
def rms_norm(call: Call) -> Callable[[], Any] | None:
    """Its forward pass, which also keeps what a backward pass would need."""
    x, weight, eps = call["x"], call["weight"], call["eps"]
    if not x.is_cuda or call["residual"] is not None:
        return None
    from liger_kernel.ops.rms_norm import rms_norm_forward

    return lambda: rms_norm_forward(x, weight, eps, 0.0, "llama", None)[0]


@peer("silu_and_mul", "Liger", needs="liger_kernel")
def silu_and_mul(call: Call) -> Callable[[], Any] | None:
    """Gate and value in arrays of their own, cut apart beforehand: it takes no view of one array."""
    if not call["x"].is_cuda:
        return None
    from liger_kernel.ops.swiglu import swiglu_forward

    gate, value = (half.contiguous() for half in call["x"].chunk(2, -1))
    return lambda: swiglu_forward(gate, value)[2]
