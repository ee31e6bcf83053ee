"""The ops over jax arrays, inside jax.jit and outside.

    from llmkernels import jax_api
    y = jax.jit(jax_api.rms_norm)(x, weight)

Arguments and results are those of the public functions, with these differences:

- Arrays are jax arrays.  int32 passes where the contract says int64, and comes back: jax has no int64 by default.
- Nothing is written in place.  What the contract writes is returned, after the other results:
  k_cache, v_cache = write_kv(k, v, k_cache, v_cache, slots).  Donate the caches to jax.jit to have memory reused.
- A QuantizedWeight of jax arrays is a pytree, and may be an argument of a jitted function.
- Options are Python values.  Under jax.jit they are static: close over them, or name them in static_argnames.

A backend that takes jax arrays, as `xla` does, is traced into the program, and jax.jit, shard_map, donation and
jax.export see nothing else.  Where none does, the reference answers on the host, through jax.pure_callback.  Policy,
`backend=` and `use` say the same as everywhere, when the call is traced.  The ledger counts what is traced once, and
what the host answers every time; only the latter is recorded.  Values (slots, lengths, page ids) are checked where they
can be read: outside jax.jit, and on the host.  There are no gradients (ValueError) and no jax.vmap: ops take whole
batches.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental.layout import Format, Layout

from llmkernels import ledger
from llmkernels import ops as _ops  # noqa: F401  declares them
from llmkernels.arrays import is_array, to_torch
from llmkernels.contract import Contract
from llmkernels.discovery import REFERENCE, cache_axes, implementation
from llmkernels.quant.weight import PARTS, QuantizedWeight
from llmkernels.registry import OPS, Choice, Op
from llmkernels.settings import Settings, current
from llmkernels.shapes import dtype_name

SAME_SIZE = {1: "uint8", 2: "int16"}  # how dtypes that NumPy does not know leave torch


def allocate_cache(
    pages: int, page_size: int, kv_heads: int, dim: int, dtype: Any, *, sharding: Any = None, backend: str = "xla"
) -> jax.Array:
    """A cache of zeros, [pages page_size kv_heads dim], in memory as the backend's kernels want it.

    On a TPU that is head by head within a page; a cache in jax's own order is right too, and copied at each call.  The
    order is no part of the shape: jax.jit keeps it only where it is told to,

        step = jax.jit(decode, donate_argnums=..., out_shardings=(None, cache.format, cache.format))

    Args:
        sharding: where the cache lies; None is the default device.
        backend: states its order by CACHE_AXES, outermost axis first; without it the cache is in jax's own order.
    """
    order = cache_axes(backend)
    place = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    zeros = partial(jax.numpy.zeros, (pages, page_size, kv_heads, dim), dtype)
    return jax.jit(zeros, out_shardings=Format(Layout(major_to_minor=order), place))()


def write_and_attend(
    q: jax.Array, k: jax.Array, v: jax.Array, k_cache: jax.Array, v_cache: jax.Array, block_table: jax.Array,
    seq_lens: jax.Array, cu_seqlens_q: jax.Array, *, backend: str | None = None, **options: Any,
) -> tuple[jax.Array, ...]:  # fmt: skip
    """write_kv of the last tokens of each sequence, then paged_attention: (out, lse where asked for, k_cache, v_cache).

    One kernel where the call is traced with max_seqlen_q=1 and the backend that answers both ops has one: on a TPU the
    attention kernel of `xla` then writes what it reads.  Otherwise both ops are called.

    Args:
        k, v: [tokens kv_heads dim], of the tokens of q.  Their slots are those that block_table gives for the last
            positions of each sequence; a page that is written must be no other sequence's.
        options: those of paged_attention.
    """
    write, attend = OPS["write_kv"], OPS["paged_attention"]
    slots = _last_slots(q.shape[0], k_cache.shape[1], block_table, seq_lens, cu_seqlens_q)
    new = (k, v, k_cache, v_cache, slots)
    scales = {name: options.get(name) for name in ("k_scale", "v_scale")}
    read = (block_table, seq_lens, cu_seqlens_q)
    call = attend.contract.bind(q, k_cache, v_cache, *read, **options)
    fused = None
    if options.get("max_seqlen_q") == 1 and _traced((q, k, v, k_cache, v_cache)):
        fused = _fused([(write, write.contract.bind(*new, **scales)), (attend, call)], backend)
    if fused is None:
        k_cache, v_cache = globals()["write_kv"](*new, **scales, backend=backend)
        answer = globals()["paged_attention"](q, k_cache, v_cache, *read, **options, backend=backend)
        return *_listed(answer), k_cache, v_cache
    named = {p.name: call[p.name] for p in attend.contract.signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    return _only_infers("write_and_attend", partial(fused, **named))(q, *new, *read)


def _fused(calls: list[tuple[Op, dict[str, Any]]], backend: str | None) -> Callable | None:
    """The one program of the backend that answers both ops, if there is one."""
    for op, call in calls:
        op.contract.result_types(_described(op.contract, call))
    with jax.ensure_compile_time_eval():
        choices = [op.pick(call, "jax", backend) for op, call in calls]
    name, *others = {choice.backend for choice in choices}
    program = None if others or name == REFERENCE else implementation(name, "paged_attention")
    if fused := getattr(program, "write_and_attend", None):
        for (op, _), choice in zip(calls, choices, strict=True):
            ledger.tally(op.name, name, choice.why).calls += 1
    return fused


def _last_slots(tokens: int, page_size: int, table: jax.Array, lengths: jax.Array, starts: jax.Array) -> jax.Array:
    """[tokens] int32: where the last tokens of each sequence lie; -1 of a token that no sequence has."""
    token = jax.numpy.arange(tokens, dtype="int32")
    seq = jax.numpy.searchsorted(starts, token, side="right") - 1
    seq = jax.numpy.clip(seq, 0, lengths.shape[0] - 1)
    position = lengths[seq] - starts[seq + 1] + token
    slot = table[seq, position // page_size] * page_size + position % page_size
    return jax.numpy.where((position >= 0) & (token < starts[-1]), slot, -1)


def _only_infers(name: str, function: Callable) -> Callable:
    """The function, which says so where a gradient is asked for."""
    answer = jax.custom_jvp(function)

    @answer.defjvp
    def refuse_gradient(primals: Any, tangents: Any) -> Any:
        raise ValueError(f"{name}: no gradients; kernels only infer: put jax.lax.stop_gradient around its arguments")

    return answer


def _function(op: Op) -> Callable:
    """The op for jax arrays, with the signature and the docstring of the public function."""

    def function(*args: Any, backend: str | None = None, **options: Any) -> Any:
        call = op.contract.bind(*args, **options)
        described = _described(op.contract, call)
        types = [
            *op.contract.result_types(described),
            *((described[name].shape, dtype_name(described[name])) for name in op.contract.written(call)),
        ]
        results = _answer(op, call, backend, [jax.ShapeDtypeStruct(shape, _jax_dtype(name)) for shape, name in types])
        return results[0] if len(results) == 1 else tuple(results)

    function.__name__ = function.__qualname__ = op.name
    function.__doc__ = op.contract.reference.__doc__
    function.__signature__ = inspect.signature(op.function)  # type: ignore[attr-defined]
    return function


def _described(contract: Contract, call: Mapping[str, Any]) -> dict[str, Any]:
    """The call with a description of each array, in the dtype the contract means, in its place.

    Raises:
        ValueError: an array of another library, or an option that is traced.
    """
    described = dict(call)
    for name, value in call.items():
        pattern = contract.shapes.inputs.get(name)
        if pattern is None:
            if isinstance(value, jax.Array):
                raise ValueError(
                    f"{contract.name}: {name} is a jax array; pass a Python value, in jax.jit by static_argnames"
                )
        elif is_array(value):
            described[name] = _description(contract.name, name, value, pattern.dtypes == ("int64",))
    return described


def _description(op: str, name: str, value: Any, wants_int64: bool) -> Any:
    if hasattr(value, "scheme"):
        return value.map(lambda part: _description(op, name, part, False))
    if not isinstance(value, jax.Array):
        raise ValueError(
            f"{op}: {name} is a {type(value).__module__} array; jax_api takes jax arrays: jax.numpy.asarray"
        )
    return jax.ShapeDtypeStruct(value.shape, np.int64 if wants_int64 and value.dtype == np.int32 else value.dtype)


def _answer(op: Op, call: Mapping[str, Any], backend: str | None, types: list[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    """What the contract returns, and then what it writes."""
    with jax.ensure_compile_time_eval():  # a first-use check in the middle of a trace runs now and is not traced
        choice = op.pick(call, "jax", backend)
    settings, contract = current(), op.contract
    options = {name: value for name, value in call.items() if value is None or name not in contract.shapes.inputs}
    arrays = {name: value for name, value in call.items() if name not in options}
    leaves, tree = jax.tree.flatten(arrays)

    def answer(*leaves: jax.Array) -> list[jax.Array]:
        if choice.backend == REFERENCE:
            host = _host(op, choice, settings, options, tree, types)
            return jax.pure_callback(host, types, *leaves) if _traced(leaves) else _put(host(*_on_host(leaves)), leaves)
        ledger.tally(op.name, choice.backend, choice.why).calls += 1
        if contract.check_values and settings.checked is not False and not _traced(leaves):
            contract.check_values({name: to_torch(value) for name, value in call.items()})
        return _listed(_run(contract, choice.run, options | jax.tree.unflatten(tree, leaves)))

    return _only_infers(op.name, answer)(*leaves)


def _host(op: Op, choice: Choice, settings: Settings, options: dict, tree: Any, types: list) -> Callable:
    """The reference as a function from jax arrays to NumPy arrays, on the CPU."""
    contract = op.contract
    tally = ledger.tally(op.name, REFERENCE, choice.why)

    def host(*leaves: jax.Array) -> list[np.ndarray]:
        tally.calls += 1
        call = options | {name: to_torch(value) for name, value in jax.tree.unflatten(tree, leaves).items()}
        written = contract.written(call)
        call |= {name: call[name].clone() for name in written}  # jax arrays are immutable
        call |= {name: call[name].long() for name, p in contract.shapes.inputs.items() if p.dtypes == ("int64",)}
        if contract.check_values and settings.checked is not False:
            contract.check_values(call)
        if settings.recorder:
            settings.recorder.note(op.name, call)
        results = [*_listed(_run(contract, contract.reference, call)), *(call[name] for name in written)]
        return [_numpy(result, type_.dtype) for result, type_ in zip(results, types, strict=True)]

    return host


def _run(contract: Contract, run: Callable, call: Mapping[str, Any]) -> Any:
    parameters = contract.signature.parameters.values()
    positional = [call[p.name] for p in parameters if p.kind is not p.KEYWORD_ONLY]
    return run(*positional, **{p.name: call[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY})


def _listed(results: Any) -> list[Any]:
    return [] if results is None else list(results) if isinstance(results, (tuple, list)) else [results]


def _traced(leaves: tuple) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def _on_host(leaves: tuple) -> Iterator[jax.Array]:
    cpu = jax.local_devices(backend="cpu")[0]
    return (jax.device_put(leaf, cpu) for leaf in leaves)


def _put(results: list[np.ndarray], leaves: tuple) -> list[jax.Array]:
    """Results on the device that the arguments lie on."""
    device = min(leaves[0].devices(), key=lambda device: device.id)
    return [jax.device_put(result, device) for result in results]


def _numpy(result: Any, dtype: np.dtype) -> np.ndarray:
    """A torch tensor as a NumPy array of `dtype`: its own, ml_dtypes' name for it, or int32 for int64."""
    if result.dtype.is_floating_point and dtype_name(result) not in ("float32", "float64", "float16"):
        import torch

        return result.contiguous().view(getattr(torch, SAME_SIZE[result.itemsize])).numpy().view(dtype)
    return result.numpy().astype(dtype, copy=False)


def _jax_dtype(name: str) -> np.dtype:
    """What jax calls the dtype; 32 bits where jax has no 64."""
    return jax.dtypes.canonicalize_dtype(name)


def _flatten(weight: QuantizedWeight) -> tuple[tuple, tuple]:
    return tuple(getattr(weight, part) for part in PARTS), (weight.scheme, weight.in_features)


def _unflatten(about: tuple, parts: Any) -> QuantizedWeight:
    """Unchecked: jax puts objects of its own in the place of arrays."""
    weight = object.__new__(QuantizedWeight)
    fields = dict(zip(PARTS, parts, strict=True)) | {"scheme": about[0], "in_features": about[1], "packed": {}}
    for name, value in fields.items():
        object.__setattr__(weight, name, value)
    return weight


jax.tree_util.register_pytree_node(QuantizedWeight, _flatten, _unflatten)
globals().update({_name: _function(_op) for _name, _op in OPS.items()})


def __getattr__(name: str) -> Any:
    raise AttributeError(f"llmkernels.jax_api has no {name!r}; the ops are {', '.join(sorted(OPS))}")
