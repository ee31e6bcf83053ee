"""Every op as torch.ops.llmkernels.<op>: what torch.compile, torch.export and CUDA graphs see of a call.

    torch.ops.llmkernels.rms_norm(x, weight, residual=r)        -> [y, residual_out]

Schema and fake kernel come from the contract, so there is nothing to write for a new op.  What differs from the public
function, because a schema can say no more:

- An op whose options decide how many arrays it returns gives a list of them; the public function unpacks it.
- A QuantizedWeight travels as its parts: `weight` is its values, and keyword arguments weight_scales, weight_zeros,
  weight_permutation, weight_input_scale, weight_scheme and weight_in_features say the rest; `parts` makes them.
  norm_linear_activation is one op, as the public function is: with weight_scheme "" its weight is dense.
- Results are contiguous and do not overlap.

The eager implementation is the public function, so dispatch, policy, ledger and checks are the same, at run time: a
`with use(...)` belongs around the call of the compiled function.  Library.define and impl register it, because
torch.library.custom_op costs several times as much a call.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch

from llmkernels import ops as _ops  # noqa: F401  declares them
from llmkernels.arrays import family, refuse_gradients, refuse_unwritable
from llmkernels.contract import Contract
from llmkernels.registry import OPS, Op

NAMESPACE = "llmkernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
PARTS = ("scales", "zeros", "permutation", "input_scale")
SCALARS = {bool: "bool", int: "SymInt", float: "float", str: "str"}
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)  # a KV cache is a view; a copy of it would be a bug
QUANTIZED: dict[str, dict[int, str]] = {}  # op -> position -> name of each argument that may be a QuantizedWeight


def call(op: str, *args: Any, **options: Any) -> Any:
    """What the public function of `op` runs while torch.compile or torch.export traces it."""
    for position, name in QUANTIZED[op].items():
        if hasattr(args[position], "scheme"):
            options = options | parts(args[position], name)
            args = (*args[:position], args[position].values, *args[position + 1 :])
    results = getattr(torch.ops.llmkernels, op)(*args, **options)
    if isinstance(results, torch.Tensor) or results is None:
        return results
    return results[0] if len(results) == 1 else tuple(results)


def parts(weight: Any, name: str = "weight") -> dict[str, Any]:
    """The keyword arguments that, beside its values, say what the QuantizedWeight given as `name` is."""
    given = {f"{name}_{part}": getattr(weight, part) for part in PARTS}
    return given | {f"{name}_scheme": weight.scheme.name, f"{name}_in_features": weight.in_features}


def schema(contract: Contract) -> str:
    """The op in torch's schema language, from the shape string and the reference's signature."""
    arguments: list[str] = []
    weights: list[str] = []
    keywords = False
    for p in contract.signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not keywords:
            arguments, keywords = [*arguments, "*"], True
        pattern = contract.shapes.inputs.get(p.name)
        if pattern is None:
            arguments.append(_option(contract.name, p))
            continue
        alias = f"({'abcdefgh'[len(arguments)]}!)" if pattern.mutated else ""
        default = "" if p.default is p.empty else "=None"
        arguments.append(f"Tensor{alias}{'?' if pattern.optional else ''} {p.name}{default}")
        if "quantized" in pattern.dtypes:
            weights += [f"Tensor? {p.name}_{part}=None" for part in PARTS]
            weights += [f'str {p.name}_scheme=""', f"SymInt {p.name}_in_features=0"]
    arguments += [] if keywords else ["*"]
    outputs = contract.shapes.outputs.values()
    result = f"({', '.join('Tensor' for _ in outputs)})" if len(outputs) != 1 else "Tensor"
    if any(output.optional for output in outputs):
        result = "Tensor[]"
    return f"{contract.name}({', '.join([*arguments, *weights, 'str? backend=None'])}) -> {result}"


def _option(op: str, p: inspect.Parameter) -> str:
    """An argument that is no array: its type from its default, or from its annotation where that is None."""
    if p.default is None:
        known = [SCALARS[kind] for kind in get_args(p.annotation) if kind in SCALARS]
        if not known:
            raise TypeError(f"{op}: annotate {p.name}, say `{p.name}: float | None = None`; its schema needs a type")
        return f"{known[0]}? {p.name}=None"
    if isinstance(p.default, tuple):
        return f"SymInt[{len(p.default)}] {p.name}={list(p.default)}"
    default = f'"{p.default}"' if isinstance(p.default, str) else p.default
    return f"{SCALARS[type(p.default)]} {p.name}={default}"


def register(op: Op) -> None:
    """Define torch.ops.llmkernels.<op>, its implementation on every device, and its fake kernel."""
    inputs = op.contract.shapes.inputs
    QUANTIZED[op.name] = {
        position: name
        for position, name in enumerate(op.contract.signature.parameters)
        if name in inputs and "quantized" in inputs[name].dtypes
    }
    text = schema(op.contract)
    LIBRARY.define(text, tags=TAGS)
    many = text.endswith("-> Tensor[]")
    LIBRARY.impl(op.name, _implementation(op, many), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{op.name}", _fake(op, many), lib=LIBRARY)


def _implementation(op: Op, many: bool) -> Callable:
    rebuild, function = _rebuilder(op), op.function.eager  # type: ignore[attr-defined]

    def implementation(*args: Any, **options: Any) -> Any:
        if rebuild:
            args, options = rebuild(args, options)
        results = function(*args, **options)
        if isinstance(results, torch.Tensor):
            return [_own(results)] if many else _own(results)
        return results and [_own(result) for result in results]

    return implementation


def _own(result: torch.Tensor) -> torch.Tensor:
    """`result`, contiguous and in memory of its own: torch forbids results that overlap, such as parts of one array."""
    if result.is_contiguous() and result.untyped_storage().nbytes() == result.nbytes:
        return result
    return result.clone(memory_format=torch.contiguous_format)


def _fake(op: Op, many: bool) -> Callable:
    rebuild = _rebuilder(op)

    def fake(*args: Any, backend: str | None = None, **options: Any) -> Any:
        if rebuild:
            args, options = rebuild(args, options)
        call = op.contract.bind(*args, **options)
        written = {name: call[name] for name in op.contract.written(call)}
        if any(isinstance(view.storage_offset(), torch.SymInt) for view in written.values()):
            _lower_offsets()
        results = [
            torch.empty(shape, dtype=getattr(torch, dtype), device=args[0].device)
            for shape, dtype in op.contract.result_types(call)
        ]
        family(op.name, call)  # one device
        refuse_gradients(op.name, call)
        refuse_unwritable(op.name, written)
        if many:
            return results
        return results[0] if len(results) == 1 else tuple(results) or None

    return fake


@functools.cache
def _lower_offsets() -> None:
    """Have inductor write into views where they lie.

    Up to torch 2.13 at least it takes a symbolic storage offset of a view that an op writes for 0, so that all layers
    of a KV cache of any number of pages write into the first: https://github.com/pytorch/pytorch/issues/198068.
    """
    from torch._inductor.lowering import lowerings, register_lowering
    from torch._inductor.virtualized import V

    offset = torch.ops.aten.sym_storage_offset.default
    if offset not in lowerings:

        @register_lowering(offset, type_promotion_kind=None)
        def lower(view: Any) -> Any:
            value = V.graph.current_node.meta["val"]
            return value.node.expr if isinstance(value, torch.SymInt) else int(value)


def _rebuilder(op: Op) -> Callable | None:
    """(args, options) as the schema has them -> as the public function has them; None where they are the same."""
    weights = QUANTIZED[op.name]
    pairs = [p.name for p in op.contract.signature.parameters.values() if isinstance(p.default, tuple)]
    if not weights and not pairs:
        return None

    def rebuild(args: Sequence[Any], options: dict[str, Any]) -> tuple[Sequence[Any], dict[str, Any]]:
        for name in pairs:
            if name in options:
                options[name] = tuple(options[name])
        for position, name in weights.items():
            given = [options.pop(f"{name}_{part}", None) for part in PARTS]
            scheme, in_features = options.pop(f"{name}_scheme", ""), options.pop(f"{name}_in_features", 0)
            if scheme:
                weight = _weight(args[position], given, scheme, in_features)
                args = (*args[:position], weight, *args[position + 1 :])
        return args, options

    return rebuild


def _weight(values: torch.Tensor, given: list, scheme: str, in_features: int) -> Any:
    """The QuantizedWeight of these parts, the same object for the same tensors, so that a backend packs it once.

    It is kept on the tensor of its values and lives as long.  Fake tensors come and go, and get a new one each time.
    """
    from llmkernels.quant import QuantizedWeight

    known = getattr(values, "_llmkernels_weight", None)
    if (
        known is not None
        and known.scheme.name == scheme
        and known.in_features == in_features
        and all(getattr(known, part) is tensor for part, tensor in zip(PARTS, given, strict=True))
    ):
        return known
    scales, zeros, permutation, input_scale = given
    weight = QuantizedWeight(values, scales, zeros, permutation, scheme, input_scale, in_features)  # type: ignore[arg-type]
    if type(values) in (torch.Tensor, torch.nn.Parameter):
        values._llmkernels_weight = weight  # type: ignore[attr-defined]
    return weight


for _op in OPS.values():
    register(_op)
