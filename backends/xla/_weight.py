"""A quantized weight as a pytree, so that it can be an argument of a compiled program."""

from dataclasses import dataclass, field, replace
from typing import Any

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Weight:
    """The parts of a QuantizedWeight, as jax arrays or None; llmkernels/quant/weight.py says what they hold.

    scheme: its Scheme.  shape: (out, in) of the dense weight.
    """

    values: Any
    scales: Any
    zeros: Any
    permutation: Any
    input_scale: Any
    scheme: Any = field(metadata={"static": True})
    shape: tuple[int, int] = field(metadata={"static": True})

    @classmethod
    def of(cls, weight):
        """The same parts, whatever arrays they are."""
        if isinstance(weight, cls):
            return weight
        parts = (weight.values, weight.scales, weight.zeros, weight.permutation, weight.input_scale)
        return cls(*parts, weight.scheme, tuple(weight.shape))

    def map(self, change):
        """The same weight with change(part) for every part that is there."""
        names = ("values", "scales", "zeros", "permutation", "input_scale")
        return replace(self, **{n: change(x) for n in names if (x := getattr(self, n)) is not None})
