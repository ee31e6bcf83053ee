"""The ops for torch tensors whose memory jax or XLA owns: what torchax.py, torch_tpu.py and torch_xla.py share.

Such a tensor has no pointer that a kernel could be given.  What its library has is a way to call a function of jax
arrays with tensors; that function is the op of llmkernels.jax_api, on whatever backend takes jax arrays.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch

from llmkernels import jax_api
from llmkernels.contract import Contract
from llmkernels.registry import OPS, Op

Bridge = Callable[[Callable, Sequence[torch.Tensor], Sequence[int]], Sequence[torch.Tensor]]
"""(function, tensors, written) -> tensors: calls a function from jax arrays to a tuple of jax arrays.

written: the places of those tensors, ascending, that the last results are copied to.
"""

LARGEST = 2**31 - 1


def functions(
    bridge: Bridge, tensor_type: Callable[[Any], bool], what: str, mode: Callable[[], Any] = nullcontext
) -> dict[str, Callable]:
    """Every op, by name, for the tensors that `tensor_type` recognises; `what` tells the user which those are.

    mode: a context manager in which such tensors can be computed with.
    """
    return {name: _function(op, bridge, tensor_type, what, mode) for name, op in OPS.items()}


def _function(
    op: Op, bridge: Bridge, tensor_type: Callable[[Any], bool], what: str, mode: Callable[[], Any]
) -> Callable:
    """The op with the signature of the public function: it writes in place what the contract writes."""
    contract = op.contract

    def function(*args: Any, backend: str | None = None, **options: Any) -> Any:
        call = contract.bind(*args, **options)
        arrays = {name: x for name, x in call.items() if x is not None and name in contract.shapes.inputs}
        leaves, tree = jax_api.jax.tree.flatten(arrays)
        for leaf in leaves:
            if not tensor_type(leaf):
                raise ValueError(f"{op.name}: an argument is of type {type(leaf).__name__}; pass {what}")
        fixed = {name: tuple(x) if isinstance(x, list) else x for name, x in call.items() if name not in arrays}
        program = _program(op.name, backend, tree, tuple(fixed.items()))
        written = _written(contract, call)
        places = [i for i, leaf in enumerate(leaves) if any(leaf is call[name] for name in written)]
        with mode():
            results = [*bridge(program, [_narrow(leaf.detach()) for leaf in leaves], places)]
            for name in reversed(written):
                call[name].copy_(results.pop())
        return None if not results else results[0] if len(results) == 1 else tuple(results)

    function.__name__ = function.__qualname__ = op.name
    function.__doc__ = contract.reference.__doc__
    return function


@cache
def _program(name: str, backend: str | None, tree: Any, fixed: tuple) -> Callable:
    """One function object for each kind of call: bridges keep what they compiled by it."""

    def program(*leaves: Any) -> tuple:
        arrays = jax_api.jax.tree.unflatten(tree, leaves)
        results = getattr(jax_api, name)(**arrays, **dict(fixed), backend=backend)
        return tuple(results) if isinstance(results, (list, tuple)) else (results,)

    return program


def _narrow(x: torch.Tensor) -> torch.Tensor:
    """int64 as int32, which is what jax computes with; an index beyond it stays beyond every cache and table."""
    return x.clamp(-1, LARGEST).to(torch.int32) if x.dtype == torch.int64 else x


def _written(contract: Contract, call: Mapping[str, Any]) -> list[str]:
    return [name for name, p in contract.shapes.inputs.items() if p.mutated and call[name] is not None]
