"""The public function of an op: real signature, and 1 to 2 microseconds from the caller to `run`.

The first call of a kind goes the long way, through Op.choose, and leaves an Entry behind: what was chosen, and a guard
that recognises the same kind of call.  A kind is: settings, backend, options, which optional arrays are None, and each
array's dtype, shape, strides and device.  A key of all that built in Python is too slow for the many arrays of
paged_attention; torch's own TensorGuards compare them in one call into C++.  The function is generated, as dataclasses
are, because a loop over *args and **options would cost more than the rest.  `llmkernels bench --dispatch` measures it.
"""

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from llmkernels import ledger
from llmkernels.settings import ASKED, current

KEYS = 4096  # combinations of options, and of the first array's shape: an engine may bring a new bound with each step
LIMIT = 64  # kinds of call remembered for one key; an engine's growing sequences would otherwise grow a list for ever

TRACED = """    if compiling():
        return traced({forward}, backend=backend)
"""
SOURCE = """
def {name}{signature}:
{traced}    try:
        plain = {plain}
        key = (asked(), backend, {key})
        entries = memo.get(key, ())
    except (AttributeError, TypeError):  # an option that cannot be hashed, or no array where one is due
        key, entries = None, ()
    for guard, tally, check, run in entries:
        if guard({required}) if plain else guard({arrays}):
            tally.calls += 1
            if check is not None:
                check(dict({call}))
            return run({forward})
    return first(dict({call}), backend, key)({forward})
"""


def function_for(op: Any) -> Callable:
    """The public function of `op`, with the reference's signature and docstring and a keyword-only `backend`."""
    contract = op.contract
    parameters = list(contract.signature.parameters.values())
    inputs = {p.name: contract.shapes.inputs[p.name] for p in parameters if p.name in contract.shapes.inputs}
    arrays = {name: name for name in inputs}  # argument -> the expression of the tensor that the guard sees
    key = [f"{parameters[0].name}.shape", *(p.name for p in parameters if p.name not in inputs)]
    for name, pattern in inputs.items():
        if "quantized" in pattern.dtypes:  # maybe a QuantizedWeight: its signature says all that its kind depends on
            key.append(f"getattr({name}, 'signature', None)")
            arrays[name] = f"({name}.values if hasattr({name}, 'scheme') else {name})"
        if pattern.optional:
            arrays[name] = f"*(() if {name} is None else ({name},))"
    absent = [f"{name} is None" for name, pattern in inputs.items() if pattern.optional]
    key.append(f"plain or ({', '.join(absent)},)" if absent else "plain")
    memo: dict[Any, list[tuple]] = {}

    def first(call: dict[str, Any], backend: str | None, key: Any) -> Callable:
        """The long way: choose, remember, and hand back what runs."""
        choice = op.choose(call, backend)
        tally = ledger.tally(op.name, choice.backend, choice.why)
        tally.calls += 1
        settings = current()
        run = ledger.noted(contract, settings.recorder, choice.run) if settings.recorder else choice.run
        guard = _guard([call[name] for name in inputs if call[name] is not None])
        if guard and key is not None:
            if key not in memo and len(memo) >= KEYS:
                del memo[next(iter(memo))]  # the oldest
            entries = memo.setdefault(key, [])
            entries.insert(0, (guard, tally, op.checks(call, settings), run))
            del entries[LIMIT:]
        return run

    backend = inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY, default=None)
    signature = contract.signature.replace(parameters=[*parameters, backend])
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    fields = {
        "name": op.name,
        "signature": inspect.Signature(bare),
        "forward": ", ".join(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else p.name for p in parameters),
        "call": ", ".join(f"{p.name}={p.name}" for p in parameters),
        "key": ", ".join(key),
        "arrays": ", ".join(arrays.values()),
        "required": ", ".join(arrays[name] for name, pattern in inputs.items() if not pattern.optional),
        "plain": " and ".join(absent) or "True",
    }
    names = {"asked": ASKED.get, "memo": memo, "first": first, "traced": _traced(op.name)}
    names["compiling"] = import_module("torch").compiler.is_compiling  # references are written in torch: it is there
    exec(compile(SOURCE.format(traced="", **fields), f"<llmkernels.{op.name}, eager>", "exec"), names)
    eager = names[op.name]  # what torch.ops.llmkernels.<op> runs, which must not ask again whether it is being traced
    exec(compile(SOURCE.format(traced=TRACED.format(**fields), **fields), f"<llmkernels.{op.name}>", "exec"), names)
    function: Any = names[op.name]
    function.eager = eager
    function.__doc__, function.__module__ = contract.reference.__doc__, contract.reference.__module__
    function.__signature__ = signature
    function.forget = memo.clear
    return function


def _traced(name: str) -> Callable:
    def traced(*args: Any, **options: Any) -> Any:
        from llmkernels import torch_library  # Dynamo follows an import statement, not import_module

        return torch_library.call(name, *args, **options)

    return traced


def _guard(arrays: list[Any]) -> Callable | None:
    """A function that tells whether arrays are of the same kind as these; None where that takes the long way."""
    torch = sys.modules.get("torch")
    tensors = [a.values if hasattr(a, "scheme") else a for a in arrays]
    if not torch or not all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in tensors):
        return None
    return _tensor_guard(tensors)


def _tensor_guard(tensors: list[Any]) -> Callable:
    from torch._C._dynamo.guards import TensorGuards  # private, but in every torch since 2.0; tests watch what it tells

    same = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    if not any(tensor.requires_grad for tensor in tensors):
        return same
    grad_enabled = import_module("torch").is_grad_enabled  # a call outside no_grad is of another kind: refused
    return lambda *tensors: not grad_enabled() and same(*tensors)
