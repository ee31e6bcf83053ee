"""One call to be timed: its arguments, copies of them, the right answer, and what the call needs at least."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch

from llmkernels.arrays import from_torch, to_torch
from llmkernels.comparison import compare
from llmkernels.contract import Contract, Cost
from llmkernels.roofline import arithmetic
from llmkernels.shapes import Sizes

Call = Mapping[str, Any]
PEER_SLACK = 8  # a peer rounds where it likes, but what computes something else is no peer
OWN_ROUNDING_SLACK = 2  # groups of other sizes have other peaks


@dataclass(eq=False)
class Subject:
    """A call that every implementation under test is given the same values of.  `call` itself is never run."""

    contract: Contract
    case: str
    dtype: str
    call: Call
    device: str = "cpu"
    sizes: Sizes = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = self.contract.validate(self.call)

    @cached_property
    def cost(self) -> Cost:
        return self.contract.cost(self.call, self.sizes)

    @property
    def arithmetic(self) -> str:
        return arithmetic(self.call, self.sizes)

    @cached_property
    def nbytes(self) -> int:
        """Memory of all arguments; views of one tensor count once."""
        return sum(memory.nbytes() for memory in _memories(self.call).values())

    @cached_property
    def oracle(self) -> list[torch.Tensor]:
        """Every output and every argument written in place, in float64 from the rounded inputs."""
        return self.answers(self.contract.reference, {name: _wide(value) for name, value in self.copy().items()})

    @cached_property
    def near(self) -> list[torch.Tensor]:
        """The same from the reference in the call's own dtype: what the tolerance is derived from."""
        return self.answers(self.contract.reference, self.copy())

    def copy(self) -> dict[str, Any]:
        """The call on memory of its own; what was a view of one tensor still is."""
        made: dict[int, Any] = {}

        def move(tensor: Any) -> Any:
            if not isinstance(tensor, torch.Tensor):
                return tensor
            memory = tensor.untyped_storage()
            if memory.data_ptr() not in made:
                made[memory.data_ptr()] = memory.clone()
            fresh = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            return fresh.set_(made[memory.data_ptr()], tensor.storage_offset(), tensor.shape, tensor.stride())

        return {name: value.map(move) if hasattr(value, "scheme") else move(value) for name, value in self.call.items()}

    def answers(self, run: Callable, call: Call, arrays: str = "torch") -> list[Any]:
        """What `run` returns, as a list, followed by the arguments that it wrote in place."""
        results = bound(self.contract, run, call)()
        found = [] if results is None else list(results) if isinstance(results, tuple) else [results]
        return found + ([call[name] for name in self._written] if arrays == "torch" else [])

    def judge(self, got: list[Any], slack: float = 1.0) -> tuple[str, float, float]:
        """What is wrong with these answers ('' if nothing), their largest error, and the tolerance there."""
        got = [to_torch(value) for value in got]
        if self.contract.judge:
            returned = got[: len(got) - len(self._written)]
            call = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in self.call.items()}
            told = tuple(x.cpu() for x in returned)
            complaints = self.contract.judge(call, told[0] if len(told) == 1 else told)
            return "; ".join(complaints), 0.0, 0.0
        names = [*self.contract.outputs(self.call), *self._written]
        if len(got) != len(names):
            return f"returned {len(got)} arrays; the contract says {', '.join(names)}", 0.0, 0.0
        complaints, error, tolerance = [], 0.0, 0.0
        terms = self.cost.operations / 2 / max(1, sum(want.numel() for want in self.oracle))
        for name, g, want, near in zip(names, got, self.oracle, self.near, strict=True):
            said, e, t = compare(name, g, want, near, self.call[name] if name in self._written else None, terms)
            if slack > 1 and e <= slack * t:
                said = []
            complaints += said
            if e * tolerance >= error * t:
                error, tolerance = e, t
        return "; ".join(complaints), error, tolerance

    def judge_own_rounding(self, got: list[Any]) -> str:
        """What is wrong with answers that round x to int8, but in other groups of columns than the contract says.

        Such an answer is to the product of unrounded x what the contract's own is: at most OWN_ROUNDING_SLACK times as
        far from it, in the mean square.  Rounding the answer to its dtype comes on top.
        """
        weight = self.call["weight"]
        plain = replace(weight, scheme=replace(weight.scheme, activation=None))
        call = {name: _wide(value) for name, value in self.copy().items()} | {"weight": plain}
        exact = self.answers(self.contract.reference, call)
        for name, g, want, unrounded in zip(self.contract.outputs(self.call), got, self.oracle, exact, strict=True):
            allowed = OWN_ROUNDING_SLACK * (want - unrounded).norm() + torch.finfo(g.dtype).eps * unrounded.norm()
            if g.shape != want.shape or not (g.double() - unrounded).norm() <= allowed:
                return f"{name} is further from the product of unrounded x than rounding it explains"
        return ""

    @property
    def _written(self) -> list[str]:
        return [p.name for p in self.contract.shapes.inputs.values() if p.mutated and self.call.get(p.name) is not None]


def bound(contract: Contract, run: Callable, call: Call) -> Callable[[], Any]:
    """run(...) as the public function calls it: positional arguments by position, the others by name."""
    parameters = contract.signature.parameters.values()
    positional = [call[p.name] for p in parameters if p.kind is not p.KEYWORD_ONLY]
    return partial(run, *positional, **{p.name: call[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY})


def as_jax(call: Call) -> dict[str, Any]:
    """The call's arrays as jax arrays, without a copy where jax can share them."""

    def move(value: Any) -> Any:
        return from_torch(value, "jax") if isinstance(value, torch.Tensor) else value

    return {name: value.map(move) if hasattr(value, "scheme") else move(value) for name, value in call.items()}


def _memories(call: Call) -> dict[int, Any]:
    found: dict[int, Any] = {}

    def note(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            found[value.untyped_storage().data_ptr()] = value.untyped_storage()
        return value

    for value in call.values():
        value.map(note) if hasattr(value, "scheme") else note(value)
    return found


def _wide(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return value.double()
    return value
