"""act(norm(x + residual) @ weightT + bias) on a TPU, dense and quantized: _linear.py, then _product.py."""

from ._linear import linear, plan, refuse_sum

__all__ = ["plan", "run", "takes"]


def takes(x, weight, **options):
    """Yield (code, reason, fix) for what the kernel does not take."""
    yield from refuse_sum(weight)


def run(x, weight, **options):
    y, kept = linear(x, weight, **options)
    return (y, kept) if options["return_residual"] else y
