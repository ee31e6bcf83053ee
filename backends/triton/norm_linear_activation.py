"""act(norm(x + residual) @ weightT + bias), dense or quantized: _linear.py chooses, _product.py multiplies."""

from ._launch import refuse_device
from ._linear import linear, refuse_sum
from ._weights import dense, form

TRAITS = {"deterministic": True, "graph_safe": True, "accumulate": "float32"}


def refuse(x, weight, **options):
    yield from refuse_device(x)
    yield from refuse_sum(weight)


def run(x, weight, *, norm, norm_weight, norm_bias, residual, bias, activation, eps, return_residual):
    y, kept = linear(
        x, form(weight) if hasattr(weight, "scheme") else dense(weight), norm=norm, gain=norm_weight, shift=norm_bias,
        residual=residual, bias=bias, activation=activation, eps=eps, return_residual=return_residual,
    )  # fmt: skip
    return (y, kept) if return_residual else y
