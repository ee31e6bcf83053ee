"""The shape language of contracts:  "x[*rows hidden]:T weight[hidden]:T -> y[*rows hidden]:T".

One string, many readers: the user, the checker, the fake kernels of torch.compile, the result types of jax.jit,
the tests, the benchmarks, the docs.

    name            one dimension; every use of a name must have the same size
    *name           any number of dimensions
    name+1          one more than the dimension `name`
    7               exactly 7
    x?[...]         the argument may be None; as an output: returned only when the call asks for it
    x![...]         written in place
    x[...]:T        dtype variable T, bound by its first use to one of the dtypes the contract lists for it
    x[...]:a|b      dtype a or dtype b; `quantized` is a QuantizedWeight, whose shape is that of the dense weight
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

_TENSOR = re.compile(r"(\w+)([!?]*)\[([^\]]*)\](?::([\w|]+))?")

Sizes = dict[str, Any]  # dimension -> size; a starred dimension -> tuple of sizes


@dataclass(frozen=True)
class Pattern:
    """What the contract says of one array."""

    name: str
    dims: tuple[str, ...]
    dtypes: tuple[str, ...]
    optional: bool
    mutated: bool

    def __str__(self) -> str:
        marks = ("!" if self.mutated else "") + ("?" if self.optional else "")
        return f"{self.name}{marks}[{' '.join(self.dims)}]" + (f":{'|'.join(self.dtypes)}" if self.dtypes else "")


class Shapes:
    """The inputs and outputs of one op, as patterns."""

    def __init__(self, text: str, dtypes: Mapping[str, tuple[str, ...]]):
        self.text = " ".join(text.split())
        self.dtypes = {variable: tuple(names) for variable, names in dtypes.items()}
        inputs, _, outputs = self.text.partition("->")
        self.inputs = {p.name: p for p in _parse(inputs)}
        self.outputs = {p.name: p for p in _parse(outputs)}

    def check(self, op: str, call: Mapping[str, Any]) -> Sizes:
        """Bind every dimension and dtype variable, or raise ValueError naming the array that disagrees.

        Returns the size of each dimension, and the name of the dtype bound to each dtype variable.
        """
        sizes: Sizes = {}
        for name, pattern in self.inputs.items():
            array = call.get(name)
            if array is None:
                if not pattern.optional:
                    raise ValueError(f"{op}: {name} is missing; pass an array, {pattern}")
                continue
            if not hasattr(array, "shape") or not hasattr(array, "dtype"):
                raise ValueError(
                    f"{op}: {name} is {array!r:.80}, of type {type(array).__name__}; pass an array, {pattern}"
                )
            if not self._bind_dtype(dtype_name(array), pattern, sizes):
                hint = "llmkernels.quant.quantize makes one" if "quantized" in pattern.dtypes else "cast it"
                says = self._allowed(pattern, sizes)
                raise ValueError(f"{op}: {name} is {dtype_name(array)}; the contract says {says}: {hint}")
            before = dict(sizes)
            if not _bind(tuple(array.shape), pattern.dims, sizes):
                known = ", ".join(f"{d}={before[d.strip('*')]}" for d in pattern.dims if d.strip("*") in before)
                raise ValueError(
                    f"{op}: {name} has shape {tuple(array.shape)}; the contract is {pattern}"
                    + (f" with {known}" if known else "")
                    + _transposed(name, tuple(array.shape), pattern.dims, before)
                )
        return sizes

    def concrete(self, name: str, sizes: Sizes) -> tuple[int, ...]:
        """The shape of the array `name` when the dimensions have these sizes."""
        pattern = self.inputs.get(name) or self.outputs[name]
        shape: list[int] = []
        for dim in pattern.dims:
            size = _size(dim, sizes)
            shape += size if isinstance(size, tuple) else [size]
        return tuple(shape)

    def dtype(self, name: str, sizes: Sizes) -> str:
        """The dtype of the array `name` once the dtype variables are bound."""
        first = (self.inputs.get(name) or self.outputs[name]).dtypes[0]
        return sizes.get(first, first)

    def _bind_dtype(self, dtype: str, pattern: Pattern, sizes: Sizes) -> bool:
        for allowed in pattern.dtypes:
            if allowed not in self.dtypes:
                if allowed == dtype:
                    return True
            elif sizes.get(allowed, dtype) == dtype and dtype in self.dtypes[allowed]:
                sizes[allowed] = dtype
                return True
        return not pattern.dtypes

    def _allowed(self, pattern: Pattern, sizes: Sizes) -> str:
        names: list[str] = []
        for allowed in pattern.dtypes:
            names += [sizes[allowed]] if allowed in sizes else self.dtypes.get(allowed, (allowed,))
        return " or ".join(names)


def dtype_name(array: Any) -> str:
    """'float32' for torch.float32, numpy.float32 and jax's float32 alike; 'quantized' for a QuantizedWeight."""
    return "quantized" if hasattr(array, "scheme") else str(array.dtype).rpartition(".")[2]


def grid(**sizes: list) -> list[dict]:
    """Every combination of the given sizes: grid(rows=[1, 7], hidden=[128]) has two cases."""
    return [dict(zip(sizes, pick, strict=True)) for pick in product(*sizes.values())]


def _parse(text: str) -> list[Pattern]:
    return [
        Pattern(name, tuple(dims.split()), tuple(dtypes.split("|")) if dtypes else (), "?" in marks, "!" in marks)
        for name, marks, dims, dtypes in _TENSOR.findall(text)
    ]


def _size(dim: str, sizes: Sizes) -> Any:
    if dim.isdigit():
        return int(dim)
    name, plus, extra = dim.partition("+")
    return sizes[name.lstrip("*")] + int(extra) if plus else sizes[dim.lstrip("*")]


def _transposed(name: str, shape: tuple, dims: tuple[str, ...], sizes: Sizes) -> str:
    """A hint where the array fits once two of its axes change places: HND caches, weights stored [in out]."""
    for i in range(len(shape)):
        for j in range(i + 1, len(shape)):
            swapped = list(shape)
            swapped[i], swapped[j] = shape[j], shape[i]
            if swapped != list(shape) and _bind(tuple(swapped), dims, dict(sizes)):
                return f"; {name}.transpose({i}, {j}) would fit: are its axes in that order?"
    return ""


def _bind(shape: tuple, dims: tuple[str, ...], sizes: Sizes) -> bool:
    star = next((i for i, dim in enumerate(dims) if dim.startswith("*")), None)
    if star is None and len(shape) != len(dims):
        return False
    if star is not None:
        span = len(shape) - len(dims) + 1
        if span < 0:
            return False
        shape = (*shape[:star], tuple(shape[star : star + span]), *shape[star + span :])
    for dim, size in zip(dims, shape, strict=True):
        name, plus, extra = dim.lstrip("*").partition("+")
        want = int(dim) if dim.isdigit() else sizes.setdefault(name, size - int(extra) if plus else size)
        if size != (want + int(extra) if plus else want):
            return False
    return True
