"""x @ wT for a quantized weight: GPTQ, Frantar et al. 2022, https://arxiv.org/abs/2210.17323; AWQ, Lin et al. 2023,
https://arxiv.org/abs/2306.00978; SmoothQuant, Xiao et al. 2022, https://arxiv.org/abs/2211.10438; FP8, Micikevicius et
al. 2022, https://arxiv.org/abs/2209.05433; MXFP4, OCP Microscaling Formats 1.0."""

import math

from llmkernels.contract import FLOATS, Cost
from llmkernels.ops.numerics import itemsize, wide
from llmkernels.ops.quantized_gemm_cases import CASES, inputs
from llmkernels.quant.activation import seen_through
from llmkernels.registry import op


def check_values(call):
    call["weight"].check_values()


def cost(call, sizes):
    rows, bias = math.prod(sizes["rows"]), call["bias"]
    elements = rows * (sizes["in"] + sizes["out"]) + (0 if bias is None else sizes["out"])
    return Cost(elements * itemsize(call["x"]) + call["weight"].nbytes, 2 * rows * sizes["in"] * sizes["out"])


@op(
    "x[*rows in]:T weight[out in]:quantized bias?[out]:T -> y[*rows out]:T",
    dtypes={"T": FLOATS},
    cases=CASES,
    inputs=inputs,
    cost=cost,
    check_values=check_values,
)
def quantized_gemm(x, weight, *, bias=None):
    """Multiply rows by the transpose of a quantized weight, and add the bias.

        y[r, n] = sum over stored columns j of x'[r, f(j)] * scales[n, g(j)] * (q[n, j] - zeros[n, g(j)]) + bias[n]

    g(j) is the group, row or block of the stored column j, and f(j) its feature: with act-order permutation[j], else j.
    x' is x, except in schemes that round activations: there it is rounded too, and that is part of the answer:

        x'[r, h] = s * round(x[r, h] / s)      ties to even, saturated
        a8         s = max over row r of |x| / 127, int8 levels -128..127
        fp8        s = max over row r of |x| / 448, e4m3 levels; in fp8_block over each 128 columns of row r
        static     s = input_scale, one for all rows; values beyond saturate

    s and x / s are computed in float32 (a reciprocal and a product are as good); a value within float32 roundoff of the
    middle of two levels may go either way.  A row (of 128 columns, in fp8_block) of zeros, or with s below 2 ** -126,
    is zeros.  One that holds a NaN or an infinity makes its row of y NaN, whatever the scale is.

    Args:
        x: activations.  They may have any strides.
        weight: a QuantizedWeight; llmkernels/quant/weight.py says how each scheme is stored.
        bias: added to each row, in the dtype of x.

    Returns:
        y in the dtype of x.  Products are summed in float32 (in int32 where both sides are integers, within a group);
        the bias is added before the one rounding at the store.  With no columns y is the bias, or zeros.

    Raises:
        ValueError: scales that are not finite, a 4-bit zero point beyond 15, a permutation that is none, an input_scale
            that is not above 0: read once for each weight.  Scales of 0, below the smallest normal number, and negative
            ones are taken as they are.
    """
    x_wide = wide(x)
    y = seen_through(x_wide, weight.scheme, weight.input_scale) @ weight.dequantize(x_wide.dtype).T
    return (y if bias is None else y + wide(bias)).to(x.dtype)
