"""What an op is: shapes, dtypes, cases, cost and reference.  Everything about an op but speed.

A contract is one decorated function; llmkernels/ops/rms_norm.py shows the whole form.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from llmkernels.shapes import Shapes, Sizes

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Case:
    """One call worth making.  `args` go to the contract's `inputs`, which turns them into arrays and options.

    `hostile` marks an input of the kind that broke other libraries.  `raises` is what the ValueError must say, where
    the contract forbids the call; otherwise the answer must be right.
    """

    name: str
    args: Mapping[str, Any]
    hostile: bool = False
    raises: str | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Cost:
    """What a call needs at least: bytes through memory (each input once, each output once) and operations."""

    bytes: float
    operations: float


@dataclass(frozen=True)
class View:
    """An input that is a view of another one: `index` into the array called `base`, then axes permuted.

    How contracts ask for layouts: packed K|V, HND caches, MLA's values inside its keys, rows with gaps between them.
    A base whose name starts with an underscore is memory only, not an argument.
    """

    base: str
    index: tuple = ()
    axes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Sparse:
    """An input too large to fill: only these rows of its first axis are ever written, the rest is untouched memory."""

    shape: tuple[int, ...]
    rows: Mapping[int, Any]


@dataclass(frozen=True)
class Contract:
    """See `op` in llmkernels/registry.py for what each field says."""

    reference: Callable
    shapes: Shapes
    cases: tuple[Case, ...]
    inputs: Callable[..., dict[str, Any]]
    cost: Callable[[Mapping[str, Any], Sizes], Cost]
    check: Callable[[Mapping[str, Any], Sizes], None] | None = None
    check_values: Callable[[Mapping[str, Any]], None] | None = None
    derive: Callable[[Mapping[str, Any], Sizes], Sizes] | None = None
    returns: Callable[[Mapping[str, Any]], tuple[str, ...]] | None = None
    judge: Callable[[Mapping[str, Any], Any], list[str]] | None = None
    signature: inspect.Signature = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "signature", inspect.signature(self.reference))

    @property
    def name(self) -> str:
        return self.reference.__name__

    @property
    def dtypes(self) -> tuple[str, ...]:
        """What the parity test runs the op in: the dtypes of T."""
        return self.shapes.dtypes["T"]

    def bind(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Every argument by name, defaults filled in.  TypeErrors become a ValueError that shows the signature."""
        try:
            bound = self.signature.bind(*args, **options)
        except TypeError as error:
            raise ValueError(f"{self.name}: {error}; call it as {self.name}{self.signature}") from None
        bound.apply_defaults()
        return dict(bound.arguments)

    def validate(self, call: Mapping[str, Any]) -> Sizes:
        """Every rule that can be seen without reading an array's values; ValueError says which one is broken."""
        sizes = self.shapes.check(self.name, call)
        for p in self.signature.parameters.values():
            if p.name not in self.shapes.inputs and (wants := _unlike(call[p.name], p)):
                value = call[p.name]
                raise ValueError(
                    f"{self.name}: {p.name} is {value!r:.80}, of type {type(value).__name__}; give {wants}"
                )
        if self.check:
            self.check(call, sizes)
        if self.derive:
            sizes |= self.derive(call, sizes)
        return sizes

    def written(self, call: Mapping[str, Any]) -> list[str]:
        """The names of the arrays that this call writes in place."""
        return [p.name for p in self.shapes.inputs.values() if p.mutated and call.get(p.name) is not None]

    def outputs(self, call: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of what this call returns, in order.  An op that only writes in place returns nothing."""
        return self.returns(call) if self.returns else tuple(self.shapes.outputs)

    def result_types(self, call: Mapping[str, Any]) -> list[tuple[tuple[int, ...], str]]:
        """(shape, dtype) of each output: what fake kernels and jax.jit need to know before anything runs."""
        sizes = self.validate(call)
        return [(self.shapes.concrete(name, sizes), self.shapes.dtype(name, sizes)) for name in self.outputs(call)]


def _unlike(value: Any, option: inspect.Parameter) -> str | None:
    """What an option should have been, if `value` is not of the kind of its default."""
    default = option.default
    if value is default or type(value).__name__ in ("SymInt", "SymFloat", "SymBool"):  # what torch.compile traces
        return None
    if isinstance(default, str):
        return None if isinstance(value, str) else f"a string, like {default!r}"
    if isinstance(default, tuple):
        like = isinstance(value, tuple | list) and len(value) == len(default)
        return None if like else f"a tuple of {len(default)}, like {default}"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "a number that fits in 64 bits"
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    return None if isinstance(value, Real) else "True or False" if isinstance(default, bool) else "a Python number"


def named(cases: Iterable[Mapping[str, Any]], *, prefix: str = "", hostile: bool = False) -> list[Case]:
    """Cases named after their arguments: {"rows": 7, "hidden": 64} becomes 'rows=7-hidden=64'."""
    return [
        Case(prefix + "-".join(f"{k}={v}".replace(" ", "") for k, v in args.items()), args, hostile) for args in cases
    ]
