"""Norm, linear layer and activation in one pass.  RMSNorm, Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467;
LayerNorm, Ba et al. 2016, https://arxiv.org/abs/1607.06450; GLU variants, Shazeer 2020, https://arxiv.org/abs/2002.05202."""

import math

import torch
from torch.nn import functional

from llmkernels.contract import FLOATS, Cost
from llmkernels.ops.norm_linear_activation_cases import CASES, GATED, inputs
from llmkernels.ops.numerics import itemsize, wide
from llmkernels.quant.activation import seen_through
from llmkernels.registry import op

NORMS = ("rms", "layer", "none")
ACTIVATIONS = {
    "none": lambda z: z,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "relu": functional.relu,
    "swiglu": functional.silu,  # of the gate
    "geglu": functional.gelu,
}


def check(call, sizes):
    norm, activation, eps = call["norm"], call["activation"], call["eps"]
    for name, given, known in (("norm", norm, NORMS), ("activation", activation, ACTIVATIONS)):
        if given not in known:
            raise ValueError(f"norm_linear_activation: {name} is {given!r}; use one of {', '.join(known)}")
    for name, norms in (("norm_weight", ("rms", "layer")), ("norm_bias", ("layer",))):
        if call[name] is not None and norm not in norms:
            raise ValueError(
                f"norm_linear_activation: {name} is given, but norm is {norm!r}; "
                f"leave it out, or use norm={' or '.join(map(repr, norms))}"
            )
    if activation in GATED and sizes["features"] % 2:
        raise ValueError(
            f"norm_linear_activation: features={sizes['features']} is odd; "
            f"{activation} takes as many rows of weight for the gate as for what it gates"
        )
    if call["return_residual"] and call["residual"] is None:
        raise ValueError(
            "norm_linear_activation: return_residual is True, but residual is None; the new residual is x: leave it out"
        )
    if norm != "none" and not 0 < eps < math.inf:
        raise ValueError(
            f"norm_linear_activation: eps is {eps}; give a number above 0, so that a row of zeros stays finite"
        )


def check_values(call):
    if hasattr(call["weight"], "scheme"):
        call["weight"].check_values()


def derive(call, sizes):
    return {"out": sizes["features"] // 2 if call["activation"] in GATED else sizes["features"]}


def returns(call):
    return ("y", "residual_out") if call["return_residual"] else ("y",)


def cost(call, sizes):
    rows, columns, weight = math.prod(sizes["rows"]), sizes["in"], call["weight"]
    streams = 1 + (call["residual"] is not None) + bool(call["return_residual"])
    elements = rows * (streams * columns + sizes["out"])
    elements += sum(
        math.prod(call[name].shape) for name in ("norm_weight", "norm_bias", "bias") if call[name] is not None
    )
    operations = 2 * rows * columns * sizes["features"] + 4 * rows * columns
    return Cost(elements * itemsize(call["x"]) + weight.nbytes, operations)


@op(
    """x[*rows in]:T weight[features in]:T|quantized norm_weight?[in]:T norm_bias?[in]:T residual?[*rows in]:T
    bias?[features]:T -> y[*rows out]:T residual_out?[*rows in]:T""",
    dtypes={"T": FLOATS},
    cases=CASES,
    inputs=inputs,
    cost=cost,
    check=check,
    check_values=check_values,
    derive=derive,
    returns=returns,
)
def norm_linear_activation(
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
    """Add the residual, normalise each row, multiply by a weight, apply an activation.

        s = x + residual
        n[r, h] = norm_weight[h] * s[r, h] / sqrt(mean over h of s[r, h]^2 + eps)                          rms
        n[r, h] = norm_weight[h] * (s[r, h] - mean) / sqrt(mean of (s[r] - mean)^2 + eps) + norm_bias[h]   layer
        n = s                                                                                              none
        z[r, f] = sum over h of n[r, h] * weight[f, h] + bias[f]
        y[r, f] = act(z[r, f])                                    silu, gelu (erf), gelu_tanh, relu, none
        y[r, f] = act(z[r, f]) * z[r, f + features / 2]           swiglu (silu), geglu (gelu, erf)

    The factor of a row commutes with the product, so a kernel may normalise after it, in the epilogue.

    Args:
        x: rows, with any strides.
        weight: dense in the dtype of x, or a QuantizedWeight.  For swiglu and geglu it packs the rows of the gate, then
            as many of what is gated.
        norm: 'rms', 'layer' or 'none'.
        norm_weight: the gain of a norm, None is 1.
        norm_bias: of 'layer'; None is 0.
        residual: added to x first; None adds nothing.
        bias: added before the activation.
        activation: 'none', 'silu', 'gelu', 'gelu_tanh', 'relu', 'swiglu' or 'geglu'.
        eps: above 0, added to the mean square; a row of zeros stays zeros before norm_bias.
        return_residual: also return s.

    Returns:
        y in the dtype of x, [*rows, features], or half the features for gated activations; with return_residual also
        residual_out = s, rounded to the dtype of x.  Everything between the inputs and the store is float32: s is not
        rounded before it is normalised (in float16 x + residual may exceed the largest number), n not before the
        product, z not before the activation.  With a QuantizedWeight whose scheme rounds activations, that float32 n is
        rounded as quantized_gemm says of x (a row of zeros gives zeros, one with a NaN or an infinity gives NaN) and
        nothing else is.  Without channels (in = 0) n @ weightT is 0.

    Raises:
        ValueError: an unknown norm or activation, a gain or bias that the norm does not have, an odd number of features
            for a gated activation, return_residual without residual, eps not above 0, a broken QuantizedWeight.
    """
    s = wide(x) if residual is None else wide(x) + wide(residual)
    n = s - s.mean(-1, keepdim=True) if norm == "layer" else s
    if norm != "none":
        n = n / torch.sqrt((n * n).mean(-1, keepdim=True) + eps)
    n = n if norm_weight is None else n * wide(norm_weight)
    n = n if norm_bias is None else n + wide(norm_bias)
    if hasattr(weight, "scheme"):
        z = seen_through(n, weight.scheme, weight.input_scale) @ weight.dequantize(n.dtype).T
    else:
        z = n @ wide(weight).T
    z = z if bias is None else z + wide(bias)
    gate, *gated = z.chunk(2, -1) if activation in GATED else (z,)
    y = ACTIVATIONS[activation](gate)
    y = (y * gated[0] if gated else y).to(x.dtype)
    return (y, s.to(x.dtype)) if return_residual else y
