"""x @ wT for quantized weights on a TPU: _linear.py prepares x, _product.py multiplies."""

from ._linear import linear, plan, refuse_sum

__all__ = ["plan", "run", "takes"]


def takes(x, weight, *, bias):
    """Yield (code, reason, fix) for what the kernel does not take."""
    yield from refuse_sum(weight)


def run(x, weight, *, bias):
    return linear(x, weight, bias=bias)[0]
