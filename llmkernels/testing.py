"""The conformance kit: every call worth making, its inputs, the oracle, and how close is close.

    for result in testing.conform("vendor", op="rms_norm"):
        print(result)

The oracle is the contract's reference in float64 on the same rounded inputs.  The tolerance comes from roundoff: an
implementation may be twice as far from the oracle as the reference run in the call's own dtype is, plus one rounding
of the output's dtype (comparison.py).  Both are relative to the largest value of a row (the last axis), so that a small
row cannot hide behind a large one.  Beside the numbers: red zones around every array, NaN in every fresh output,
arguments that must not change, bytes of written arguments that must stay, and the same bits again where
`deterministic` is declared.
"""

import multiprocessing
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any

import torch

from llmkernels import ops as _ops  # noqa: F401  declares them
from llmkernels.arrays import from_torch, to_torch
from llmkernels.comparison import compare
from llmkernels.contract import Case, Contract
from llmkernels.discovery import REFERENCE, Refusal, absent, emulated, has, implementation, package, refusals
from llmkernels.inputs import inputs
from llmkernels.memory import Fence, Gaps, bits, poisoned_allocations
from llmkernels.registry import OPS, REFERENCE_TRAITS, get
from llmkernels.settings import use


@dataclass(frozen=True)
class Result:
    """What came of one case on one backend.  error and tolerance are relative to the largest value of the row."""

    op: str
    backend: str
    dtype: str
    case: str
    verdict: str  # passed, failed or refused
    error: float | None = None
    tolerance: float | None = None
    reasons: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        numbers = "" if self.error is None else f" error {self.error:.1e} of {self.tolerance:.1e}"
        return f"{self.op} {self.backend} {self.dtype} {self.case!r}: {self.verdict}{numbers} {'; '.join(self.reasons)}"


def conform(
    backend: str,
    op: str | None = None,
    dtype: str | None = None,
    case: str | None = None,
    device: str = "cpu",
    emulate: bool = False,
    jobs: int = 1,
) -> Iterator[Result]:
    """Every case of `op` (of all ops) in every dtype on `backend`.  `case` is a part of the names to keep.

    Ops that the backend has no file for are left out; `missing` names them.
    jobs: processes at once, each with one thread.  Results keep their order.

    Raises:
        ValueError: no such op or backend, no emulation where one is asked for, or what the backend lacks here.
    """
    if backend != REFERENCE and not emulate and (why := absent(backend)):
        raise ValueError(f"{backend} cannot be used here: {why}")
    without = missing(backend, op)
    asked = [call for call in calls(op, dtype, case) if call[0].name not in without]
    with emulated(backend) if emulate else nullcontext():
        if jobs == 1:
            for call in asked:
                yield check(*call, backend, device)
            return
        names = [(contract.name, kind, one.name) for contract, kind, one in asked]
        forks = device == "cpu" and (backend == REFERENCE or getattr(package(backend), "FORKS", True))
        if forks and backend != REFERENCE:
            for entry in OPS.values():  # loaded once, before the processes part
                implementation(backend, entry.name)
        context = multiprocessing.get_context("fork" if forks else "spawn")
        with ProcessPoolExecutor(jobs, context, _prepare, (None if forks or not emulate else backend,)) as pool:
            yield from pool.map(partial(_check_named, backend, device), names)


_emulations = ExitStack()  # of a process of its own, for as long as it lives


def _prepare(emulating: str | None) -> None:
    """One thread a process; the emulation that a forked one would have inherited."""
    torch.set_num_threads(1)
    if emulating:
        _emulations.enter_context(emulated(emulating))


def missing(backend: str, op: str | None = None) -> list[str]:
    """The ops (or of `op` alone) that `backend` has no file for."""
    asked = [get(op).name] if op else list(OPS)
    return [] if backend == REFERENCE else [name for name in asked if not has(backend, name)]


def _check_named(backend: str, device: str, names: tuple[str, str, str]) -> Result:
    op, dtype, case = names
    contract = OPS[op].contract
    return check(contract, dtype, next(one for one in contract.cases if one.name == case), backend, device)


def calls(
    op: str | None = None, dtype: str | None = None, case: str | None = None
) -> Iterator[tuple[Contract, str, Case]]:
    """Every op x dtype x case."""
    for entry in [get(op)] if op else OPS.values():
        for name in entry.contract.dtypes:
            for one in entry.contract.cases:
                if dtype in (None, name) and (case or "") in one.name:
                    yield entry.contract, name, one


def check(contract: Contract, dtype: str, case: Case, backend: str, device: str = "cpu") -> Result:
    """One case on one backend: passed, failed or refused, and why."""
    if backend == REFERENCE:
        module = ModuleType(REFERENCE)
        module.run, module.TRAITS, arrays = contract.reference, REFERENCE_TRAITS, "torch"  # type: ignore[attr-defined]
    else:
        arrays = package(backend).ARRAYS[0]
        reasons = [] if case.raises else _refusals(contract, dtype, case, backend, device, arrays)
        if reasons:
            return Result(contract.name, backend, dtype, case.name, "refused", reasons=[str(r) for r in reasons])
        module = implementation(backend, contract.name) or ModuleType("absent")
    return check_run(contract, dtype, case, module, backend, device, arrays)


def check_run(
    contract: Contract,
    dtype: str,
    case: Case,
    module: ModuleType,
    backend: str,
    device: str = "cpu",
    arrays: str = "torch",
) -> Result:
    """The same for any module with a `run`: what a backend's author calls on a kernel that is not installed yet."""

    def verdict(complaints: list[str], error: float | None = None, tolerance: float | None = None) -> Result:
        word = "failed" if complaints else "passed"
        return Result(contract.name, backend, dtype, case.name, word, error, tolerance, complaints)

    if case.raises:
        return verdict(_forbidden(contract, dtype, case, backend, device))
    fence = Fence(device)
    call = inputs(contract, case, dtype, device, fence)
    before = {name: _copy(value) for name, value in call.items()}
    written = [name for name in contract.written(call) if before[name] is not None]
    gaps = {name: Gaps(call[name], [call[other] for other in written]) for name in written}
    try:
        sizes = contract.validate(call)
        if contract.check_values:
            contract.check_values(call)
        with poisoned_allocations(fence):
            results = _run(contract, module.run, call, arrays)
    except Exception as fault:  # whatever an implementation raises is a failure to report, not to die of
        return verdict([f"raised {type(fault).__name__}: {fault}"])
    complaints = fence.trespasses()
    complaints += _changed(contract, call, before)
    complaints += [f"wrote beside {name}, between its rows" for name, gap in gaps.items() if gap.written()]
    want = _run(contract, contract.reference, inputs(contract, case, dtype, wide=True), "torch", written=True)
    near = _run(contract, contract.reference, inputs(contract, case, dtype), "torch", written=True)
    error, tolerance = 0.0, 0.0
    if contract.judge:
        complaints += contract.judge(inputs(contract, case, dtype), _cpu(results[0] if len(results) == 1 else results))
    else:
        written = contract.written(call)
        names = [*contract.outputs(call), *written]
        got = [*results, *(call[name] for name in written)] if arrays == "torch" else results
        if len(got) != len(want):
            return verdict([f"returned {len(results)} arrays; the contract says {', '.join(names) or 'none'}"])
        terms = contract.cost(call, sizes).operations / 2 / max(1, sum(w.numel() for w in want))
        for name, g, w, n in zip(names, got, want, near, strict=True):
            original = _cpu(before[name]) if name in written and before[name] is not None else None
            said, e, t = compare(name, _cpu(to_torch(g)), w, n, original, terms)
            complaints += said
            if e * tolerance >= error * t:  # the output nearest to its tolerance, or furthest beyond it
                error, tolerance = e, t
    if not complaints and getattr(module, "TRAITS", {}).get("deterministic") and not contract.written(call):
        again = _run(contract, module.run, call, arrays)
        if not all(
            torch.equal(bits(_cpu(to_torch(a)).contiguous()), bits(_cpu(to_torch(b)).contiguous()))
            for a, b in zip(results, again, strict=True)
        ):
            complaints.append("declares deterministic, and a second run gave other bits")
    return verdict(complaints, error, tolerance)


def _run(contract: Contract, run: Callable, call: Mapping[str, Any], arrays: str, written: bool = False) -> list[Any]:
    """What `run` returns, as a list; with `written`, followed by the arguments it wrote."""
    values = dict(call)
    if arrays == "jax":
        values = {name: _to_jax(value) for name, value in values.items()}
    parameters = contract.signature.parameters.values()
    positional = [values[p.name] for p in parameters if p.kind is not p.KEYWORD_ONLY]
    results = run(*positional, **{p.name: values[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY})
    results = [] if results is None else list(results) if isinstance(results, tuple) else [results]
    return results + ([values[name] for name in contract.written(call)] if written else [])


def _to_jax(value: Any) -> Any:
    if hasattr(value, "scheme"):
        return value.map(_to_jax)
    return from_torch(value.contiguous(), "jax") if isinstance(value, torch.Tensor) else value


def _changed(contract: Contract, call: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Complaints about arguments that were only to be read."""
    written = contract.written(call)
    return [
        f"changed {name}, which is only to be read"
        for name, value in call.items()
        if name not in written
        for now, then in zip(_parts(value), _parts(before[name]), strict=False)
        if not torch.equal(bits(now.contiguous()), bits(then))
        and not any(call[w].untyped_storage().data_ptr() == now.untyped_storage().data_ptr() for w in written)
    ]


def _parts(value: Any) -> list[torch.Tensor]:
    """The tensors that an argument consists of: itself, or those of a QuantizedWeight."""
    if not hasattr(value, "scheme"):
        return [value] if isinstance(value, torch.Tensor) else []
    parts: list[torch.Tensor] = []

    def keep(part: torch.Tensor) -> torch.Tensor:
        parts.append(part)
        return part

    value.map(keep)
    return parts


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.numel() < 2**28:
        return value.clone(memory_format=torch.contiguous_format)
    return value.map(_copy) if hasattr(value, "scheme") else None


def _cpu(value: Any) -> Any:
    return tuple(map(_cpu, value)) if isinstance(value, (tuple, list)) else value.detach().cpu()


def _forbidden(contract: Contract, dtype: str, case: Case, backend: str, device: str) -> list[str]:
    """Complaints about a call that the contract forbids: it must raise, before any kernel starts, and say why."""
    call = inputs(contract, case, dtype, device)
    try:
        with use(checked=True, policy="silent", verify=False):
            OPS[contract.name].choose(call, backend)
    except ValueError as error:
        if re.search(case.raises or "", str(error)):
            return []
        return [f"raised {str(error)!r}; it should say {case.raises!r}"]
    return [f"was accepted; it should raise a ValueError that says {case.raises!r}"]


def _refusals(contract: Contract, dtype: str, case: Case, backend: str, device: str, arrays: str) -> list[Refusal]:
    call = inputs(contract, case, dtype, device)
    if arrays == "jax":
        call = {name: _to_jax(value) for name, value in call.items()}
    return refusals(backend, contract.name, arrays, call, {})
