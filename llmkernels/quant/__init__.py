"""Quantized weights: what a scheme means, how a weight is stored, how one is made.

from llmkernels.quant import quantize
weight = quantize(dense, "w4a16_g128_zp")
y = llmkernels.quantized_gemm(x, weight)
"""

from llmkernels.quant.quantizer import quantize
from llmkernels.quant.scheme import SCHEMES, Scheme, scheme
from llmkernels.quant.weight import QuantizedWeight

__all__ = ["SCHEMES", "QuantizedWeight", "Scheme", "quantize", "scheme"]
